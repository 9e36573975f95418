"""Turning one state dict into another by rules, with an account of every tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from tabulate import tabulate

from ..errors import CheckpointError
from .atomic import atomic_open
from .strict_checkpoint import join_names

__all__ = ["Conversion", "Row", "Rule", "apply_rules", "save_whole"]

Tensors = Dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """
    What becomes of the tensors whose whole name matches ``pattern``.

    Args:
        pattern (str): regular expression.
        target: the new name, with ``\\1`` or ``\\g<name>`` for the groups of the pattern, or a
            function from the match to the name; or None to leave the tensor out. A name with an
            index, as ``layers.weight[2]``, is that part of a tensor which several make up, one
            after the other along the first axis.
        transform: from the tensor to the one that is stored.
        note (str): what the transform does, or why the tensor is left out.
    """

    pattern: str
    target: Union[str, Callable[[re.Match], str], None]
    transform: Optional[Callable[[torch.Tensor], torch.Tensor]] = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the account: a tensor of either side, and what was done with it."""

    action: str  # "carried", "copied", "initialised" or "left out"
    source: str
    target: str
    shape: Tuple[int, ...]
    note: str = ""


@dataclass
class Conversion:
    """A state dict in the making, and the account of it."""

    state: Tensors = field(default_factory=dict)
    rows: List[Row] = field(default_factory=list)

    def put(
        self, action: str, source: str, target: str, tensor: torch.Tensor, note: str = ""
    ) -> None:
        """
        Store a tensor and its row.

        Raises:
            CheckpointError: if there is one of that name.
        """
        if target in self.state:
            raise CheckpointError(f"{source} becomes {target}, and so does another tensor.")
        self.state[target] = tensor
        self.rows.append(Row(action, source, target, tuple(tensor.shape), note))

    def leave_out(self, source: str, tensor: torch.Tensor, note: str) -> None:
        """Record that a tensor is not used."""
        self.rows.append(Row("left out", source, "", tuple(tensor.shape), note))

    def join_parts(self) -> None:
        """
        Make one tensor of all whose names differ in their index alone.

        Raises:
            CheckpointError: if one of them is missing.
        """
        parts: Dict[str, Dict[int, torch.Tensor]] = {}
        for target in list(self.state):
            match = re.fullmatch(r"(.+)\[(\d+)\]", target)
            if match:
                parts.setdefault(match[1], {})[int(match[2])] = self.state.pop(target)
        for name, tensors in parts.items():
            missing = [i for i in range(max(tensors) + 1) if i not in tensors]
            if missing:
                raise CheckpointError(f"it has nothing for {name}[{missing[0]}].")
            try:
                self.state[name] = torch.cat([tensors[i] for i in range(len(tensors))])
            except RuntimeError as e:
                raise CheckpointError(f"the parts of {name} have unfit shapes: {e}") from e

    def complete(self, model: Tensors, may_initialise: Callable[[str], Optional[str]]) -> None:
        """
        Fill in what the model has and the source does not, and check that all of it fits.

        Args:
            model (dict[str, Tensor]): the model's state dict, with its initial values.
            may_initialise: from a name to the reason why its initial value will do, or None.

        Raises:
            CheckpointError: if a tensor is missing, left over, or of another shape.
        """
        missing = []
        for name, value in model.items():
            if name in self.state:
                continue
            reason = may_initialise(name)
            if reason is None:
                missing.append(name)
            else:
                self.put("initialised", "", name, value, reason)
        unexpected = [name for name in self.state if name not in model]
        shapes = [
            f"{name} {tuple(self.state[name].shape)} instead of {tuple(model[name].shape)}"
            for name in self.state
            if name in model and self.state[name].shape != model[name].shape
        ]
        for title, names in (
            ("it has nothing for", missing),
            ("the model has no", unexpected),
            ("of another shape are", shapes),
        ):
            if names:
                raise CheckpointError(
                    "the checkpoint is not one of the model of this config (another architecture "
                    f"or number of classes): {title} {join_names(names)}"
                )

    def report(self) -> str:
        """
        Returns:
            str: a table of all rows, and a line that counts them.
        """
        counts: Dict[str, int] = {}
        for row in self.rows:
            counts[row.action] = counts.get(row.action, 0) + 1
        table = tabulate(
            [
                (r.action, r.source or "-", r.target or "-", "x".join(map(str, r.shape)), r.note)
                for r in self.rows
            ],
            headers=("action", "from", "to", "shape", "note"),
        )
        return table + "\n" + ", ".join(f"{n} {action}" for action, n in counts.items())


def apply_rules(
    source: Tensors, rules: Sequence[Rule], allow_unmatched: Sequence[str] = ()
) -> Conversion:
    """
    Args:
        source (dict[str, Tensor]): the weights to convert.
        rules (sequence[Rule]): the first that matches a name decides.
        allow_unmatched (sequence[str]): shell patterns of names that may match no rule.

    Returns:
        Conversion: what the rules make of it, not yet complete.

    Raises:
        CheckpointError: if a name matches no rule, two become one, or a part of one is missing.
    """
    result = Conversion()
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    unmatched = []
    for name, tensor in source.items():
        matches = ((pattern.fullmatch(name), rule) for pattern, rule in compiled)
        match, rule = next(((m, rule) for m, rule in matches if m), (None, None))
        if match is None or rule is None:
            if any(fnmatch(name, p) for p in allow_unmatched):
                result.leave_out(name, tensor, "allowed to match no rule")
            else:
                unmatched.append(name)
            continue
        if rule.target is None:
            result.leave_out(name, tensor, rule.note)
            continue
        target = rule.target(match) if callable(rule.target) else match.expand(rule.target)
        try:
            value = rule.transform(tensor) if rule.transform else tensor
        except (RuntimeError, IndexError) as e:
            raise CheckpointError(f"{name} has the unfit shape {tuple(tensor.shape)}.") from e
        result.put("carried", name, target, value, rule.note)
    if unmatched:
        raise CheckpointError(
            f"no rule fits {len(unmatched)} names: {join_names(unmatched)} "
            "--allow-unmatched PATTERN leaves them out."
        )
    result.join_parts()
    return result


def save_whole(state: Tensors, path: str, author: str) -> None:
    """
    Write a checkpoint that :class:`DetectionCheckpointer` loads; all of it, or nothing.

    Args:
        state (dict[str, Tensor]): the weights.
        path (str): the file, ending in ``.pth``.
        author (str): what made it, stored beside the weights.

    Raises:
        CheckpointError: if ``path`` does not end in ``.pth``.
        OSError: if it cannot be written.
    """
    if not path.endswith(".pth"):
        raise CheckpointError(f"the output is {path!r}; it must end in .pth.")
    # Views would drag the whole tensor that they are cut from into the file.
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    with atomic_open(path, "wb") as f:
        torch.save({"model": state, "__author__": author}, f)
