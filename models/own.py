"""A network of the user's own, built by a function in a file of his."""

import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from torch import nn
from torch.nn.parameter import UninitializedParameter

from utils.config import InputCode
from utils.errors import InputError, shorten
from utils.files import check_file


def build_own(code: InputCode, num_classes: int) -> nn.Module:
    """Run a file and call its function with ``num_classes``, or without arguments where it takes none of that name.

    Args:
        code: the user's; this runs it, so it must never come from a model card or any other file.
        num_classes: number of outputs.

    Raises:
        InputError: the file or the function is missing, one of them failed, or the result is no network.
    """
    check_file(code.path)
    function = getattr(_run(code), code.function, None)
    if not callable(function):
        raise InputError(f"--model {code}: the file has no function {code.function}")
    try:
        takes = "num_classes" in inspect.signature(function).parameters
        network = function(num_classes=num_classes) if takes else function()
    except (Exception, SystemExit) as error:
        _fail(code, error)
    if not isinstance(network, nn.Module):
        raise InputError(f"--model {code}: returned {type(network).__name__}, expected a torch.nn.Module")
    if any(isinstance(parameter, UninitializedParameter) for parameter in network.parameters()):
        raise InputError(f"--model {code}: a lazy layer has no size yet; give it one, or run the network once")
    return network


def _run(code: InputCode) -> ModuleType:
    """Return the file as a module."""
    specification = importlib.util.spec_from_file_location(f"own_{code.path.stem}", code.path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up there
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script would end the run without a word
        _fail(code, error)
    return module


def _fail(code: InputCode, error: Exception | SystemExit) -> NoReturn:
    """Say in one line what the user's code did, and in which of its lines."""
    lines: list[Any] = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == code.path.absolute()
    ]
    lines += [error.lineno] if isinstance(error, SyntaxError) and error.lineno else []
    where = f", line {lines[-1]}" if lines else ""
    hint = "; its folder has to be on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
    message = shorten(str(error).partition("\n")[0])
    raise InputError(f"--model {code}{where}: {type(error).__name__}: {message}{hint}") from error
