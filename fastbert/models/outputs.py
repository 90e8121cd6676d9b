"""Models return dataclasses that are also ordered dictionaries, and tuples when indexed by an integer.

Field names, their order and the access rules are those of transformers, so code written for its outputs works here.
Letters: `B` sequences, `S` longest sequence, `H` hidden, `N` heads, `L` layers, `V` vocabulary. Logits and hidden
states have the model's dtype. Rows at padding positions are zero.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Later:
    """A `Later` is a value of an output that is computed at its first access.

    make: computes the value, with the gradient mode and the autocast of the `Later`'s construction.
    """

    def __init__(self, make: Callable[[], Any], device: torch.device) -> None:
        self._make, self._device_type = make, device.type
        self._gradients = torch.is_grad_enabled()
        self._autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def make(self) -> Any:
        """Returns the value."""
        enabled, dtype = self._autocast
        with torch.set_grad_enabled(self._gradients), torch.autocast(self._device_type, dtype, enabled=enabled):
            return self._make()


class ModelOutput(OrderedDict[str, Any]):
    """This is the base of the output classes. A subclass is a `@dataclass` whose fields are None by default.

    `out.logits`, `out["logits"]` and `out[0]` are the same value; `keys`, `values`, `items`, `len`, `in`, iteration
    (over keys), integers and slices see only the fields that are not None, in the order they were set, which after
    construction is the order of the class. Setting a field by attribute or by key changes both; None removes its key.
    Unpack with `to_tuple()`. Deleting an entry raises TypeError. A field may be a `Later`.

    If the only argument is a mapping or (name, value) pairs, these are the items. So `type(out)(dict(out))` works, with
    which DataParallel and accelerate rebuild outputs. Instances are pytrees of torch and can be pickled.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            _flatten,
            partial(_unflatten, cls),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__}: not a dataclass; make instances of a subclass that is one")

    def __post_init__(self) -> None:
        # The generated __init__ has set every field. The rest are items that came in one argument.
        first_name = next(iter(self.__dataclass_fields__))
        first = getattr(self, first_name)
        if isinstance(first, (Mapping, Iterator, list, tuple)) and list(self) == [first_name]:
            items = list(first.items()) if isinstance(first, Mapping) else list(first)
            if all(isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], str) for item in items):
                setattr(self, first_name, None)
                for name, value in items:
                    self[name] = value
            elif isinstance(first, Iterator):
                setattr(self, first_name, items)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            value = super().__getitem__(key)
            if isinstance(value, Later):
                self[key] = value = value.make()
            return value
        names = list(self)[key]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise TypeError(f"key: got {key!r}, expected a string; entries are set by name")
        if value is not None:
            super().__setitem__(key, value)
        elif key in self:
            super().__delitem__(key)
        if not isinstance(value, Later):
            super().__setattr__(key, value)

    def get(self, key: str, default: Any = None) -> Any:
        value = super().get(key, default)
        return self[key] if isinstance(value, Later) else value

    def values(self) -> Any:
        self._make_all()
        return super().values()

    def items(self) -> Any:
        self._make_all()
        return super().items()

    def _make_all(self) -> None:
        for name in self:
            self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dataclass_fields__:
            self[name] = value
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dataclass_fields__:
            self._refuse("del")
        super().__delattr__(name)

    def __delitem__(self, key: str) -> NoReturn:
        self._refuse("del")

    def pop(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("pop")

    def popitem(self, last: bool = True) -> NoReturn:
        self._refuse("popitem")

    def clear(self) -> NoReturn:
        self._refuse("clear")

    def setdefault(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("setdefault")

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("update")

    def _refuse(self, operation: str) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: {operation} is not supported; set fields one by one, to None to drop one"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _unflatten, (type(self), list(self.values()), list(self)), dict(self.__dict__)

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the values that are not None, in order, as `return_dict=False` does."""
        return tuple(self.values())


class _Entry:
    """An _Entry lets an attribute be read while its entry is a `Later`. The class has None under its name, as for any
    field.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, output: ModelOutput | None, owner: type) -> Any:
        return None if output is None else output[self.name]


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    # A `Later` is a leaf. DDP and FSDP search every output for tensors, and do not compute it.
    return list(OrderedDict.values(output)), list(output)


def _flatten_with_keys(output: ModelOutput) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(name), value) for name, value in OrderedDict.items(output)], list(output)


def _unflatten(cls: type[ModelOutput], values: Iterable[Any], names: list[str]) -> ModelOutput:
    output = cls()
    for name, value in zip(names, values, strict=True):
        output[name] = value
    return output


def _p_is_next(name: str, logits: Tensor | None) -> Tensor:
    if logits is None:
        raise AttributeError(f"p_is_next: needs {name}, which is None")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits, dim=-1, dtype=dtype)[..., 0]


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """Output of `BertModel`.

    last_hidden_state: (B, S, H).
    pooler_output: (B, H), tanh of a linear layer on the first valid token; None without a pooler.
    hidden_states: tuple of L+1 tensors (B, S, H), the embeddings and then each layer; None unless requested.
    attentions: tuple of L tensors (B, N, S, S), probabilities; None unless requested.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class AlbertForPreTrainingOutput(ModelOutput):
    """Output of `BertForPreTraining` with a config of ALBERT.

    loss: (), masked-language-model loss + loss of the order; None without both labels.
    prediction_logits: (B, S, V).
    sop_logits: (B, num_labels), logit 0 = the sentences are in their order, logit 1 = they are exchanged.
    hidden_states, attentions: as in `BertForPreTrainingOutput`.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    sop_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BertForPreTrainingOutput(ModelOutput):
    """Output of `BertForPreTraining`.

    loss: (), masked-language-model loss + next-sentence loss; None without both labels.
    prediction_logits: (B, S, V).
    seq_relationship_logits: (B, 2), logit 0 = the second sentence is next, logit 1 = it is random.
    hidden_states: tuple of L+1 tensors (B, S, H); None unless requested.
    attentions: tuple of L tensors (B, N, S, S); None unless requested.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def p_is_next(self) -> Tensor:
        """(B,) float32 or float64, the probability that the second sentence follows the first."""
        return _p_is_next("seq_relationship_logits", self.seq_relationship_logits)


@dataclass
class MaskedLMOutput(ModelOutput):
    """Output of `BertForMaskedLM`.

    loss: (), cross entropy over the labelled tokens; None without labels.
    logits: (B, S, V).
    hidden_states: tuple of L+1 tensors (B, S, H); None unless requested.
    attentions: tuple of L tensors (B, N, S, S); None unless requested.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class NextSentencePredictorOutput(ModelOutput):
    """Output of `BertForNextSentencePrediction`.

    loss: (), cross entropy; None without labels.
    logits: (B, 2), logit 0 = the second sentence is next, logit 1 = it is random; `p_is_next` removes the doubt.
    hidden_states: tuple of L+1 tensors (B, S, H); None unless requested.
    attentions: tuple of L tensors (B, N, S, S); None unless requested.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def p_is_next(self) -> Tensor:
        """(B,) float32 or float64, the probability that the second sentence follows the first."""
        return _p_is_next("logits", self.logits)


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """Output of `BertForSequenceClassification`.

    loss: (), by the configuration's problem type; None without labels.
    logits: (B, labels).
    hidden_states: tuple of L+1 tensors (B, S, H); None unless requested.
    attentions: tuple of L tensors (B, N, S, S); None unless requested.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MultipleChoiceModelOutput(ModelOutput):
    """Output of `BertForMultipleChoice`, where every input is (B, choices, S).

    loss: (), cross entropy over the choices; None without labels.
    logits: (B, choices).
    hidden_states: tuple of L+1 tensors (B * choices, S, H); None unless requested.
    attentions: tuple of L tensors (B * choices, N, S, S); None unless requested.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """Output of `BertForTokenClassification`.

    loss: (), cross entropy over the labelled tokens; None without labels.
    logits: (B, S, labels).
    hidden_states: tuple of L+1 tensors (B, S, H); None unless requested.
    attentions: tuple of L tensors (B, N, S, S); None unless requested.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Output of `BertForQuestionAnswering`.

    loss: (), mean of the cross entropies of start and end; None without both positions.
    start_logits: (B, S), for the first token of the answer.
    end_logits: (B, S), for the last token of the answer.
    hidden_states: tuple of L+1 tensors (B, S, H); None unless requested.
    attentions: tuple of L tensors (B, N, S, S); None unless requested.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# The models with a decoder give these as a `Later`.
MaskedLMOutput.logits = _Entry("logits")  # type: ignore[assignment]
BertForPreTrainingOutput.prediction_logits = _Entry("prediction_logits")  # type: ignore[assignment]
