"""Conversion of one state dict into another by rules, with an account of every tensor."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Callable, Collection, Dict, List, Optional, Sequence, Tuple

import torch
from tabulate import tabulate

from ..errors import CheckpointError
from .atomic import atomic_open
from .strict_checkpoint import check_fit, join_names

Tensors = Dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """
    What happens to the tensors whose full name matches ``pattern``.

    Args:
        pattern (str): regular expression.
        target (str or None): the new name, with ``\\1`` for the first group of the pattern. None
            leaves the tensor out. A name with an index, such as ``layers.weight[2]``, is a part
            of a tensor. The parts are concatenated along the first axis.
        transform (callable or None): computes the stored tensor from the tensor.
        note (str): what the transform does, or why the tensor is left out.
    """

    pattern: str
    target: Optional[str]
    transform: Optional[Callable[[torch.Tensor], torch.Tensor]] = None
    note: str = ""


@dataclass
class Row:
    """One line of the account: what happened to a tensor of the source or of the model."""

    action: str  # "carried", "copied", "initialized" or "left out"
    source: str
    target: str
    shape: Tuple[int, ...]
    note: str = ""


@dataclass
class Conversion:
    """The converted state dict, and the account of every tensor."""

    state: Tensors = field(default_factory=dict)
    rows: List[Row] = field(default_factory=list)

    def put(
        self, action: str, source: str, target: str, tensor: torch.Tensor, note: str = ""
    ) -> None:
        """Store a tensor; raise a CheckpointError if its name is taken."""
        if target in self.state:
            raise CheckpointError(f"{source} and another tensor both become {target}.")
        self.state[target] = tensor
        self.rows.append(Row(action, source, target, tuple(tensor.shape), note))

    def leave_out(self, source: str, tensor: torch.Tensor, note: str) -> None:
        """Record that a tensor is not used."""
        self.rows.append(Row("left out", source, "", tuple(tensor.shape), note))

    def join_parts(self) -> None:
        """Concatenate the parts of tensors; raise a CheckpointError if one is missing."""
        parts: Dict[str, Dict[int, torch.Tensor]] = {}
        for target in list(self.state):
            match = re.fullmatch(r"(.+)\[(\d+)\]", target)
            if match:
                parts.setdefault(match[1], {})[int(match[2])] = self.state.pop(target)
        for name, tensors in parts.items():
            try:
                self.state[name] = torch.cat([tensors[i] for i in range(len(tensors))])
            except KeyError as e:
                raise CheckpointError(f"{name}[{e}] is missing from the checkpoint.") from None
            except RuntimeError as e:
                raise CheckpointError(f"the shapes of the parts of {name} differ: {e}") from e

    def check(self, model: Tensors, new: Collection[str] = ()) -> None:
        """Raise a CheckpointError if names or shapes differ. Names in ``new`` may be missing."""
        check_fit(
            "the checkpoint",
            [name for name in model if name not in self.state and name not in new],
            [name for name in self.state if name not in model],
            [(n, x.shape, model[n].shape) for n, x in self.state.items() if n in model],
        )

    def report(self) -> str:
        """Return a table of all rows, and a line that counts them by action."""
        counts = Counter(row.action for row in self.rows)
        rows = [
            (r.action, r.source or "-", r.target or "-", "x".join(map(str, r.shape)), r.note)
            for r in self.rows
        ]
        table = tabulate(rows, headers=("action", "from", "to", "shape", "note"))
        return table + "\n" + ", ".join(f"{n} {action}" for action, n in counts.items())


def apply_rules(
    source: Tensors, rules: Sequence[Rule], allow_unmatched: Sequence[str] = ()
) -> Conversion:
    """
    Convert a state dict by rules.

    Args:
        source (dict[str, Tensor]): the weights to convert.
        rules (sequence[Rule]): the first rule that matches a name decides.
        allow_unmatched (sequence[str]): shell patterns of names that may match no rule.

    Returns:
        Conversion: not checked against a model yet.

    Raises:
        CheckpointError: if a name matches no rule, two tensors get one name, or a part is missing.
    """
    allowed = (Rule(translate(p), None, note="allowed to match no rule") for p in allow_unmatched)
    rules = [*rules, *allowed]
    result = Conversion()
    unmatched = []
    for name, tensor in source.items():
        matches = ((re.fullmatch(rule.pattern, name), rule) for rule in rules)
        match, rule = next(((m, rule) for m, rule in matches if m), (None, None))
        if match is None or rule is None:
            unmatched.append(name)
        elif rule.target is None:
            result.leave_out(name, tensor, rule.note)
        else:
            try:
                value = rule.transform(tensor) if rule.transform else tensor
            except (RuntimeError, IndexError) as e:
                raise CheckpointError(f"{name} has the wrong shape {tuple(tensor.shape)}.") from e
            result.put("carried", name, match.expand(rule.target), value, rule.note)
    if unmatched:
        raise CheckpointError(
            f"no rule matches {len(unmatched)} names: {join_names(unmatched)}; leave them out "
            "with --allow-unmatched PATTERN."
        )
    result.join_parts()
    return result


def save_whole(state: Tensors, path: str, author: str) -> None:
    """
    Write a checkpoint for :class:`DetectionCheckpointer` with :func:`atomic_open`.

    Args:
        state (dict[str, Tensor]): the weights.
        path (str): the ``.pth`` file.
        author (str): what made the checkpoint; stored beside the weights.

    Raises:
        CheckpointError: if ``path`` does not end in ``.pth``.
        OSError: if the file cannot be written.
    """
    if not path.endswith(".pth"):
        raise CheckpointError(f"the output is {path!r}; it must end in .pth.")
    # torch.save writes the full storage of a view, so views are cloned.
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    with atomic_open(path, "wb") as f:
        torch.save({"model": state, "__author__": author}, f)
