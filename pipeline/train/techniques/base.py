"""The contract of a technique: what changes training without being a tower, a loss or an optimizer; the registry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import Registry, configclass
from clipwright.pipeline.losses.base import LossTerm
from clipwright.pipeline.model.two_tower import TwoTower


@configclass
class TechniqueConfig:
    """Fields every technique has."""

    name: str
    """Preset name of the technique; `clipwright list techniques` shows all."""


class TrainedModel(Protocol):
    """What a technique sees of the engine. Under ZeRO 3 the towers' parameters are empty outside forward."""

    @property
    def towers(self) -> TwoTower: ...

    def weights(self) -> dict[str, Tensor]:
        """Returns copies of the complete fp32 weights on rank 0, elsewhere nothing; every rank must call it."""
        ...


class Technique:
    """Base of techniques: hooks that the trainer calls on every rank. By default each does nothing."""

    def prepare(self, towers: TwoTower) -> None:
        """Changes the towers in place, at every start, before they are compiled and given to DeepSpeed."""

    def loss_terms(self) -> dict[str, LossTerm]:
        """Returns terms to add to the loss, by name."""
        return {}

    def initialize(self, towers: TwoTower, loss: LossTerm) -> None:
        """Sets the initial weights of a new run, after `prepare`; not called on resume."""

    def after_update(self, model: TrainedModel, step: int) -> None:
        """Called after each update of the weights; `step` steps are complete. Not called for a skipped step.

        If it raises, the state must be as before: the run saves, ends, and calls it again when it is resumed.
        """

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors to store in a checkpoint; those of rank 0 are written."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned; called on resume, before the first step. KeyError if tensors are missing."""

    def export(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights for validation and model folders, given the trained ones."""
        return weights


class Techniques(Technique):
    """The techniques of a run, by name: each hook runs theirs in order. State names are `NAME/TENSOR`."""

    def __init__(self, techniques: dict[str, Technique]) -> None:
        self.techniques = techniques

    def add_first(self, name: str, technique: Technique) -> None:
        """Adds a technique whose hooks run before those of the others."""
        self.techniques = {name: technique, **self.techniques}

    @property
    def has_after_update(self) -> bool:
        """Whether any of them has the hook `after_update`."""
        return any(type(technique).after_update is not Technique.after_update for technique in self.techniques.values())

    def prepare(self, towers: TwoTower) -> None:
        for name, technique in self.techniques.items():
            with _named(name, "prepare"):
                technique.prepare(towers)

    def loss_terms(self) -> dict[str, LossTerm]:
        terms: dict[str, LossTerm] = {}
        for name, technique in self.techniques.items():
            with _named(name, "loss_terms"):
                terms.update(technique.loss_terms())
        return terms

    def initialize(self, towers: TwoTower, loss: LossTerm) -> None:
        for name, technique in self.techniques.items():
            with _named(name, "initialize"):
                technique.initialize(towers, loss)

    def after_update(self, model: TrainedModel, step: int) -> None:
        for name, technique in self.techniques.items():
            with _named(name, f"after_update of step {step}"):
                technique.after_update(model, step)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": tensor
            for name, technique in self.techniques.items()
            for key, tensor in technique.state().items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, technique in self.techniques.items():
            prefix = f"{name}/"
            technique.load_state({key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)})

    def export(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, technique in self.techniques.items():
            with _named(name, "export"):
                weights = technique.export(weights)
        return weights


@contextmanager
def _named(name: str, hook: str) -> Iterator[None]:
    """Turns an exception of a technique's hook into E_TECHNIQUE, which names both."""
    try:
        yield
    except (ClipwrightError, OSError):
        raise
    except Exception as error:
        raise ClipwrightError(
            "E_TECHNIQUE",
            "a technique failed",
            where=f"techniques: {name}, {hook}",
            found=f"{type(error).__name__}: {error}",
            fix="correct the technique; --debug shows the traceback",
        ) from error


TECHNIQUES: Registry[Technique] = Registry("technique", "clipwright.pipeline.train.techniques")


def build_techniques(configs: Sequence[TechniqueConfig]) -> Techniques:
    """Builds the techniques of a config; E_CONFIG_VALUE if one is listed twice."""
    twice = [name for name, count in Counter(config.name for config in configs).items() if count > 1]
    if twice:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "a technique is listed twice",
            where="techniques",
            found=", ".join(twice),
            fix="set all of its fields in one entry",
        )
    return Techniques({config.name: TECHNIQUES.build(config) for config in configs})
