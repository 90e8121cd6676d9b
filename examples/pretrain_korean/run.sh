#!/bin/sh
# From Korean text to a BERT that fills a mask.
#
#     sh examples/pretrain_korean/run.sh OUTPUT [TEXT ...]
#
# TEXT: files or folders, as `fastbert pretrain --text` takes them; without any, help pages are fetched.
# Environment: PYTHON, STEPS, VOCABULARY, SHAPE. The same command again goes on where it stopped.
set -eu
output=${1:?name a folder for the result}
shift
python=${PYTHON:-python3}

if [ $# -eq 0 ]; then
    "$python" "$(dirname "$0")/../../benchmarks/public_text.py" korean --output "$output/text"
    set -- "$output/text/korean.jsonl"
fi

if [ ! -e "$output/tokenizer" ]; then
    "$python" -m fastbert tokenizer train --files "$@" --vocab-size "${VOCABULARY:-8000}" --output "$output/tokenizer"
fi

"$python" -m fastbert pretrain --text "$@" --tokenizer "$output/tokenizer" --output "$output/model" \
    --model-config "${SHAPE:-mini}" --dropout 0 --max-length 128 --steps "${STEPS:-5000}" --tokens-per-step 2048 \
    --learning-rate 1e-3 --warmup 0.1 --evaluation-share 0.1 --resume

"$python" -m fastbert fill-mask "나는 [MASK]를 좋아한다" --model "$output/model"
"$python" -m fastbert fill-mask "파일을 [MASK]합니다." --model "$output/model"
"$python" -m fastbert next-sentence "파일을 엽니다." "저장을 클릭합니다." --model "$output/model"
