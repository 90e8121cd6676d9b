"""Our own models work when their operations are traced, transformed, differentiated again or watched."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fastbert import BertConfig, BertModel, ops
from fastbert.models import tasks
from fastbert.ops import packing, tracing
from helpers import rms_error

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 4 + [0] * 3, [1, 1, 0, 1, 1, 1, 1], [1] * 7])
OTHER = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]])
X, T = (torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


def make(kind: Any = BertModel, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(3)
    settings = {
        name: options.pop(name) for name in ("model_type", "pad_token_id", "num_attention_heads") if name in options
    }
    model = kind(BertConfig(**{**SIZES, **settings}), **options).eval()
    model.config.extra["return_dict"] = False
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    return model.to(dtype)


KINDS = {
    "BertModel": lambda: make(),
    "another head size": lambda: make(num_attention_heads=4),
    "roberta": lambda: make(model_type="roberta", pad_token_id=1),
    **{
        name: functools.partial(make, getattr(tasks, name))
        for name in (
            "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction", "BertForSequenceClassification",
            "BertForTokenClassification", "BertForQuestionAnswering",
        )
    },
}  # fmt: skip


def alike(ours: Any, theirs: Any, bound: float = 3e-6) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert rms_error(a.detach(), b.detach()) < bound


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_jit_trace(kind, masked, check, gradients):
    """Catches a trace that keeps the packing, the shape or the weights of the batch it was made with."""
    model = KINDS[kind]()
    inputs = (IDS, MASK) if masked else (IDS,)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, inputs, check_trace=check)
        longer = torch.cat([IDS, IDS[:1]]), torch.cat([OTHER, MASK[:1]])
        wider = torch.cat([IDS, IDS + 0], 1), torch.cat([OTHER, MASK], 1)
        for other in ((IDS, OTHER), longer, wider):
            alike(traced(*other[: len(inputs)]), model(*other[: len(inputs)]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        alike(traced(*inputs), model(*inputs))


def test_jit_trace_warns_of_nothing():
    """Catches a look at a traced shape or value, of which torch warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(make(), (IDS, MASK))


def test_jit_trace_of_losses_and_states():
    """Catches padding that enters a traced loss, and states that are left packed."""

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make(tasks.BertForMaskedLM)

        def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Any:
            loss, logits, states = self.model(ids, mask, labels=labels, output_hidden_states=True)
            return loss, logits, *states

    module = Losses()
    traced = torch.jit.trace(module, (IDS, MASK, IDS))
    alike(traced(IDS, OTHER, IDS + 1), module(IDS, OTHER, IDS + 1))


def test_jit_trace_of_choices():
    """Catches a number of choices that a trace keeps."""
    model = make(tasks.BertForMultipleChoice)
    traced = torch.jit.trace(model, (IDS[None], MASK[None]))
    other = IDS.view(1, 3, 7).repeat(2, 2, 1), OTHER.view(1, 3, 7).repeat(2, 2, 1)
    alike(traced(*other), model(*other))


def test_what_a_tracer_would_keep_is_refused():
    """Catches lengths that a trace of packed rows would keep for every later batch."""
    model, cu_seqlens = make(), torch.tensor([0, 7, 14, 21], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="a tracer would store"):
        torch.jit.trace(lambda ids, ends: model.forward_packed(ids, ends), (IDS.flatten(), cu_seqlens))
    with pytest.raises(RuntimeError, match="a tracer would store"):
        torch.jit.trace(lambda mask: packing.unpad(mask).indices, (MASK,))
    with pytest.raises(TypeError, match=r"symbolic_trace.*torch\.export"):
        torch.fx.symbolic_trace(model)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
def test_make_fx(kind, mode):
    """Catches a graph of aten operations that holds for one mask."""
    model = KINDS[kind]()
    with torch.no_grad():
        graph = make_fx(lambda *args: model(*args), tracing_mode=mode, _allow_non_fake_inputs=True)(IDS, MASK)
        alike(graph(IDS, OTHER), model(IDS, OTHER))


def test_tensors_without_numbers():
    """Catches a look at the values of fake and of meta tensors."""
    model = make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(IDS), mode.from_tensor(MASK))[0].shape == (3, 7, 32)
    assert model.to("meta")(IDS.to("meta"), MASK.to("meta"))[0].shape == (3, 7, 32)


def last(model: Any, embeds: Tensor) -> Tensor:
    state: Tensor = model(inputs_embeds=embeds)[0]
    return state


def forward_mode(model: Any) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(last(model, forward_ad.make_dual(X.to(model.dtype), T.to(model.dtype)))).tangent


def total(model: Any) -> Any:
    return lambda embeds: last(model, embeds).pow(3).sum()


def penalty(model: Any) -> Tensor:
    """The gradient of a gradient's norm, of all parameters."""
    x = X.to(model.dtype).requires_grad_()
    (first,) = torch.autograd.grad(total(model)(x), x, create_graph=True)
    wanted = [p for name, p in model.named_parameters() if name.startswith(("embeddings.LayerNorm", "encoder"))]
    return torch.cat([g.flatten() for g in torch.autograd.grad(first.pow(2).sum(), wanted)])


DERIVATIVES = {
    "grad": lambda m, x, t: grad(total(m))(x),
    "vjp": lambda m, x, t: vjp(lambda e: last(m, e), x)[1](t)[0],
    "jvp": lambda m, x, t: jvp(lambda e: last(m, e), (x,), (t,))[1],
    "jacrev": lambda m, x, t: jacrev(lambda e: m(inputs_embeds=e)[1])(x),
    "jacfwd": lambda m, x, t: jacfwd(lambda e: m(inputs_embeds=e)[1])(x),
    "hessian": lambda m, x, t: hessian(total(m))(x[:1, :2]),
    "forward AD": lambda m, x, t: forward_mode(m),
    "vectorized jacobian": lambda m, x, t: torch.autograd.functional.jacobian(
        lambda e: m(inputs_embeds=e)[1], x, vectorize=True
    ),
    "hessian by autograd": lambda m, x, t: torch.autograd.functional.hessian(total(m), x[:1, :2]),
    "jvp by autograd": lambda m, x, t: torch.autograd.functional.jvp(lambda e: last(m, e), x, t)[1],
    "hvp by autograd": lambda m, x, t: torch.autograd.functional.hvp(total(m), x, t)[1],
    "gradient penalty": lambda m, x, t: penalty(m),
    "checkpoint": lambda m, x, t: vjp_of_checkpoint(m, x, t),
}


def vjp_of_checkpoint(model: Any, x: Tensor, t: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(lambda e: last(model, e), x, use_reentrant=False)
    return torch.autograd.grad(out, x, t)[0]


class Plain(nn.Module):
    """The same numbers from the reference, which is nothing but plain operations."""

    def __init__(self, model: BertModel) -> None:
        super().__init__()
        self.model, self.config, self.dtype = model, model.config, model.dtype

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.named_parameters(*args, **kwargs)

    def forward(self, inputs_embeds: Tensor) -> Any:
        from fastbert import reference

        params = dict(self.model.named_parameters())
        states = reference.bert(params, self.config, inputs_embeds=inputs_embeds, dtype=self.dtype)
        return states.last_hidden_state, states.pooler_output


@pytest.mark.parametrize("mode", ["auto", "triton", "torch", "float64"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name, mode):
    """Catches a derivative that is missing, or that is silently zero or wrong, of first and of second order."""
    dtype = torch.float64 if mode == "float64" else torch.float32
    model = make(dtype=dtype, backend="auto" if mode == "float64" else mode)
    exact = make(dtype=torch.float64)
    derivative = DERIVATIVES[name](model, X.to(dtype), T.to(dtype))
    expected = DERIVATIVES[name](Plain(exact), X.double(), T.double())
    assert rms_error(derivative.detach(), expected.detach()) < (1e-10 if mode == "float64" else 2e-5)


def test_gradgradcheck():
    """Catches a second derivative that finite differences contradict."""
    model = make(dtype=torch.float64)
    x = X[:1, :2].double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda e: last(model, e).pow(3).mean(), (x,), atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "layer_norm", "gelu", "attention", "pooling", "embedding"])
def test_second_derivatives_of_operations(name, device):
    """Catches an operation of ours whose backward pass hides its inputs from a second one."""
    torch.manual_seed(0)
    batch = packing.from_lengths([3, 1, 2], device)
    x, w, v, u = (torch.randn(*shape, device=device) for shape in ((6, 32), (32, 32), (32,), (6, 96)))
    ids = torch.arange(6, device=device)
    functions = {
        "linear": lambda policy: ops.linear(x, w, v, "gelu", policy=policy),
        "layer_norm": lambda policy: ops.bias_residual_layer_norm(x, v, None, v, v, 1e-5, policy=policy),
        "gelu": lambda policy: ops.bias_gelu(x, v, policy=policy),
        "attention": lambda policy: ops.varlen_attention(u, batch, 2, policy=policy),
        "pooling": lambda policy: ops.pool(x, batch.cu_seqlens, "mean", normalize=True, policy=policy),
        "embedding": lambda policy: ops.embedding_layer_norm(ids, ids, ids, w, w, w, v, v, 1e-5, policy=policy),
    }
    leaves = [t.requires_grad_() for t in (x, w, v, u)]

    def second(policy: ops.Policy) -> list[Tensor]:
        first = torch.autograd.grad(functions[name](policy).pow(3).sum(), leaves, create_graph=True, allow_unused=True)
        norm = sum(g.pow(2).sum() for g in first if g is not None)
        return [g for g in torch.autograd.grad(norm, leaves, allow_unused=True) if g is not None]

    for ours, plain in zip(second(ops.Policy("triton", strict=True)), second(ops.Policy("torch")), strict=True):
        assert rms_error(ours, plain) < 1e-4


@pytest.mark.parametrize("gradients", [True, False])
def test_vmap(gradients):
    """Catches a read of ids or masks while vmap has many of them."""
    model = make()
    with torch.set_grad_enabled(gradients):
        output = vmap(lambda ids, mask: model(ids[None], mask[None])[0][0])(IDS, MASK)
        alike([output], [model(IDS, MASK)[0]])
        compiled = torch.compile(vmap(lambda ids, mask: model(ids[None], mask[None])[0][0]), backend="eager")
        alike([compiled(IDS, MASK)], [model(IDS, MASK)[0]])


def test_gradients_of_each_sample():
    """Catches parameters of a transform that are kept, packed or fused."""
    model = make(tasks.BertForSequenceClassification, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        state: Tensor = functional_call(model, parameters, (ids[None], mask[None]))[0].pow(3).sum()
        return state

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, IDS, MASK)
    for i in range(3):
        model.zero_grad()
        model(IDS[i : i + 1], MASK[i : i + 1])[0].pow(3).sum().backward()
        moved = [name for name in gradients if not name.endswith("key.bias")]  # whose gradient is rounding alone
        alike([gradients[name][i] for name in moved], [model.get_parameter(name).grad for name in moved], 1e-10)


def test_ensemble():
    """Catches weights of one member of an ensemble that are taken for another's."""
    model = make()
    stacked = {name: torch.stack([p.detach(), p.detach() * 1.1]) for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        outputs = vmap(lambda parameters: functional_call(model, parameters, (IDS, MASK))[0])(stacked)
        for parameter in other.parameters():
            parameter.mul_(1.1)
        alike(outputs, [model(IDS, MASK)[0], other(IDS, MASK)[0]])


def test_functional_call():
    """Catches weights that are kept for parameters which were freed, and whose addresses others have got."""
    model, other = make(), make()
    before = other(IDS, MASK)[0]
    with torch.no_grad():
        for factor in (1.0, 1.1, 1.2, 1.3, 1.0):
            parameters = {name: p.detach() * factor for name, p in model.named_parameters()}
            output = functional_call(model, parameters, (IDS, MASK))[0]
            del parameters
            fresh = copy.deepcopy(other)
            for parameter in fresh.parameters():
                parameter.mul_(factor)
            alike([output], [fresh(IDS, MASK)[0]])
        alike([model(IDS, MASK)[0]], [before])


def test_padding_that_is_not_packed_away():
    """Catches padding that reaches an output where it is not packed away: odd ids, NaN, rows without a token."""
    model = make()
    embeds = torch.randn(3, 7, 32)
    spoiled, bad = embeds.masked_fill(MASK[:, :, None] == 0, torch.nan), IDS.masked_fill(MASK == 0, 999)
    empty = MASK * torch.tensor([[1], [0], [1]])
    for inputs in ((spoiled, MASK), (bad, MASK), (IDS, empty)):
        name = "inputs_embeds" if inputs[0].is_floating_point() else "input_ids"
        call = {name: inputs[0], "attention_mask": inputs[1]}
        alike(vjp(lambda call=call: model(**call))[0], model(**call))


def test_the_question_and_its_answers():
    """Catches a context that is not seen, and one that is taken for another."""
    assert tracing.observed(X) is None and tracing.transformed(X) is None
    with torch.device("cpu"), torch.profiler.profile():
        assert tracing.observed() is None  # nothing that looks at the operations
    with TorchFunctionMode():
        assert "TorchFunctionMode" in str(tracing.observed()) and tracing.transformed() is None
    with forward_ad.dual_level():
        assert tracing.observed() == tracing.transformed() == "forward-mode AD is on"
    vmap(lambda x: x if "torch.func" in str(tracing.transformed(x)) else None)(X)

    class Subclass(Tensor):
        pass

    assert "Subclass" in str(tracing.transformed(X.as_subclass(Subclass)))
    assert not tracing.recorded(X)


def test_function_mode_sees_the_operations():
    """Catches a C++ kernel that runs past a mode which may replace any function."""

    class Doubled(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            return out * 2 if function is nn.functional.layer_norm else out

    model, torch_model = make(), make(backend="torch")
    with torch.no_grad(), Doubled():
        alike(model(IDS, MASK), torch_model(IDS, MASK))
        assert rms_error(model(IDS, MASK)[0], make()(IDS, MASK)[0]) < 1e-6
    with torch.no_grad():
        inner = model(IDS, MASK)[0]
    with torch.no_grad(), Doubled():
        assert rms_error(model(IDS, MASK)[0], inner) > 0.1


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("change", ["meta", torch.float64, torch.bfloat16])
def test_default_device_and_dtype(change, backend, precision):
    """Catches memory for C++ kernels that is made on the default device, or in the default dtype."""
    model = make(backend=backend, precision=precision)
    with torch.no_grad():
        expected = model(IDS, MASK)
        vectors = ops.pool(expected[0].flatten(0, 1), torch.tensor([0, 9, 21], dtype=torch.int32), "mean")
        fresh, ends = make(backend=backend, precision=precision), torch.tensor([0, 9, 21], dtype=torch.int32)
        before = torch.get_default_dtype()
        if change == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(change)
        try:
            output = fresh(IDS, MASK)
            again = ops.pool(output[0].flatten(0, 1), ends, "mean")
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True)) and torch.equal(again, vectors)


def test_strict_and_invariant_policies_refuse():
    """Catches a promise of a policy that plain operations cannot keep."""
    with pytest.raises(ops.BackendError, match=r"torch\.jit\.trace"):
        torch.jit.trace(make(batch_invariant=True), (IDS, MASK))
    strict, on_cpu = make(backend="triton", strict=True), make(backend="cpu", strict=True)
    with pytest.raises(ops.BackendError, match=r"torch\.func"):
        vjp(lambda: strict(IDS, MASK)[0])
    alike(vjp(lambda: on_cpu(IDS, MASK))[0], make()(IDS, MASK))


def test_deterministic_and_anomaly_modes():
    """Catches an operation without a deterministic kind, or a NaN in a backward pass."""
    model = make()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            model(IDS, MASK)[0].pow(3).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


class Wrapped(Tensor):
    """A tensor whose numbers are inside of it, as those of torchao and DTensor are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        tensor: Any = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Wrapped) else x, (args, kwargs or {}))
        out = function(*args, **kwargs)
        keeps = function in (torch.ops.aten.detach.default, torch.ops.aten.t.default, torch.ops.aten.alias.default)
        return Wrapped(out) if keeps else out


def test_weights_of_another_kind():
    """Catches a kernel that gets the address of a weight whose numbers are elsewhere."""
    model = make()
    expected = model(IDS, MASK)
    for linear in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        linear.weight = nn.Parameter(Wrapped(linear.weight.detach()), requires_grad=False)
    with torch.no_grad():
        alike(model(IDS, MASK), expected)
