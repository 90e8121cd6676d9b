// The words that a CUDA graph reads of a batch, written to pinned memory in one pass.
#include <cstring>

#include "vector.h"

namespace {

// A row of n ids, or none where they are null, and zeros up to T'.
void put(int64_t* row, const int64_t* ids, int64_t n, int64_t bucket) {
    if (ids == nullptr) n = 0;
    if (n > 0) memcpy(row, ids, n * sizeof(int64_t));
    memset(row + n, 0, (bucket - n) * sizeof(int64_t));
}

}  // namespace

// words: (n_words,), three rows of `bucket` ids (input_ids, token_type_ids, position_ids), the number of the batch, its
// tokens, and what follows from its lengths. lengths: (n_words - 2 bucket,), the words after the first two rows. Ids are
// (n_tokens,), or null: token types are zeros then, and positions those of `lengths`.
EXPORT void fastbert_fill_words(int64_t* words, int64_t n_words, int64_t bucket, const int64_t* lengths, int64_t number,
                                int64_t n_tokens, const int64_t* input_ids, const int64_t* token_type_ids,
                                const int64_t* position_ids) {
    put(words, input_ids, n_tokens, bucket);
    put(words + bucket, token_type_ids, n_tokens, bucket);
    int64_t first = position_ids == nullptr ? 0 : bucket;
    if (first > 0) put(words + 2 * bucket, position_ids, n_tokens, bucket);
    memcpy(words + 2 * bucket + first, lengths + first, (n_words - 2 * bucket - first) * sizeof(int64_t));
    words[3 * bucket] = number, words[3 * bucket + 1] = n_tokens;
}
