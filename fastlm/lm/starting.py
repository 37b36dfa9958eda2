"""What a training run starts from: text or pairs, a new model or a saved one with its tokenizer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import checkpoint, generation, pairdata, preparation, tokenizer
from .config import difference
from .errors import UsageError
from .kinds import KINDS, LanguageModel
from .recipe import DEFAULTS, Recipe
from .tokenizer import Tokenizer

# what a model calls its sizes, and what the command line does
_OPTIONS = {
    "hidden_size": "hidden",
    "embedding_dim": "embedding",
    "num_layers": "layers",
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "ffn_size": "ffn",
    "context": "context",
    "tied": "tied",
    "dropout": "dropout",
    "z_loss": "z_loss",
    "recompute": "recompute",
}
FREE = ("dropout", "z_loss", "recompute")  # the weights fit whatever these are
LR = 1e-3  # of a model that has learned already


@dataclass(frozen=True)
class Start:
    """A saved model. `settings`: those of a `Recipe` that its sizes and tokenizer decide."""

    saved: checkpoint.Checkpoint
    model: dict[str, Any]
    settings: dict[str, Any]
    tokenizer: Tokenizer

    def require_sizes(self, model: LanguageModel) -> None:
        """Raises:
        UsageError: options ask for another model; the message lists the differences.
        """
        now = {name: value for name, value in model.config_dict().items() if name not in FREE}
        then = {name: value for name, value in self.model.items() if name in now}
        if lines := difference(then, now):
            raise UsageError(
                f"--init {self.saved.path} has a model of its own sizes: {'; '.join(lines)}"
            )

    def load_into(self, model: LanguageModel) -> None:
        """The saved parameters; refuses as `require_sizes`."""
        self.require_sizes(model)
        checkpoint.load_parameters(model, self.saved)


def start_from(path: Path) -> Start:
    """From a run, checkpoint or model folder.

    Raises:
        CheckpointError: nothing whole is there, or no language model.
    """
    saved = checkpoint.find(path)
    checkpoint.say_skipped(saved)
    names = {made.__name__: kind for kind, both in KINDS.items() for made in both}
    try:
        model = dict(saved.state["config"]["model"])
        kind = names[model.pop("kind")]
    except (KeyError, TypeError, AttributeError) as error:
        raise generation.no_model(saved, error) from None
    found = tokenizer.load(saved.path / checkpoint.TOKENIZER)
    settings = {_OPTIONS[name]: value for name, value in model.items() if name in _OPTIONS}
    settings |= {"model": kind, "init": str(path.resolve()), "tokenizer": found.kind, "lr": LR}
    if (context := model.get("context")) is not None:
        settings["seq"] = min(context, DEFAULTS[kind]["seq"])
    return Start(saved, model, settings, found)


def start_of(given: dict[str, Any], saved: checkpoint.Checkpoint | None) -> Start | None:
    """What `init` among the given options names; None for a new model and for a resumed run.

    Raises:
        UsageError: the resumed run started from something else, or the tokenizer is not that of
        the model.
    """
    if given.get("init") is None:
        return None
    if saved is not None:
        before = saved.settings.get("init")
        if before != str(Path(given["init"]).resolve()):
            raise UsageError(
                f"{saved.path} started from {before or 'a new model'}; use another --out"
            )
        return None
    start = start_from(Path(given["init"]))
    # the settings of the run that made it may be given again, by --config
    own = start.saved.settings
    agreed = {
        "tokenizer": ("auto", start.tokenizer.kind),
        "vocab": (start.tokenizer.vocab_size, own.get("vocab")),
    }
    for name, values in agreed.items():
        if name in given and given[name] not in values:
            raise UsageError(f"--{name} is decided by --init, which has a tokenizer")
    return start


@dataclass(frozen=True)
class Chosen:
    """What a run is made of, before any text is read. `tokenizer` None: one is to be made."""

    recipe: Recipe
    start: Start | None
    tokenizer: Tokenizer | None

    def prepare(self) -> preparation.Prepared | pairdata.PreparedPairs:
        return prepare(self.recipe, self.tokenizer)


def choose(given: dict[str, Any], saved: checkpoint.Checkpoint | None) -> Chosen:
    """From the settings given now and the checkpoint that is resumed, if one is.

    Raises:
        UsageError: a setting is out of range, or as `start_of`.
    """
    if saved is not None and "train" not in saved.state.get("config", {}):
        raise UsageError(f"{saved.path} is of another command than train; use another --out")
    start = start_of(given, saved)
    remembered = saved.settings if saved is not None else {}
    source, known_settings = (saved, remembered) if start is None else (start.saved, start.settings)
    kind = known_settings.get("model")
    if source is not None and kind is not None and given.get("model", kind) != kind:
        raise UsageError(f"{source.path} is of --model {kind}, not {given['model']}")
    with source.understood() if source is not None else nullcontext():
        recipe = Recipe.of(known_settings, given)
        recipe.train_config()
    known = None if start is None else start.tokenizer
    if saved is not None and recipe.init is not None:
        known = tokenizer.load(saved.path / checkpoint.TOKENIZER)
    return Chosen(recipe, start, known)


def prepare(
    recipe: Recipe, given: Tokenizer | None = None
) -> preparation.Prepared | pairdata.PreparedPairs:
    """The text or pairs of a recipe as tokens, of the tokenizer given if there is one."""
    if recipe.pairs is not None:
        return pairdata.prepare_pairs(recipe.pair_config(), given)
    return preparation.prepare(recipe.data_config(), given=given)


def describe(prepared: preparation.Prepared | pairdata.PreparedPairs) -> list[str]:
    if isinstance(prepared, pairdata.PreparedPairs):
        return pairdata.describe(prepared)
    return preparation.describe(prepared)
