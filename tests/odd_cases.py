"""ODD holds everything that users do to a live BertModel, by name: the functions of two modules."""

from __future__ import annotations

import types

import odd_modules
import odd_weights

ODD = {
    name: function
    for module in (odd_weights, odd_modules)
    for name, function in vars(module).items()
    if isinstance(function, types.FunctionType) and function.__module__ == module.__name__
}
