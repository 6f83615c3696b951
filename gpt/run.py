"""A run: all that training needs to go on, which is what a checkpoint keeps."""
from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from gpt.config import Config
from gpt.model import GPT
from gpt.optimizer import make_optimizer
from gpt.tokenizer import CharTokenizer
from minitensor.random import get_state


class Evaluation(NamedTuple):
    """One line of metrics.jsonl; losses are in nats a token, and a token is a character."""
    step: int                # steps done
    batch_loss: float        # mean of the batches since the last evaluation, with dropout
    train_loss: float        # over a fixed part of the training split, by the method of val_loss
    val_loss: float          # over the whole validation split
    val_bits: float          # the same in bits
    lr: float                # learning rate of the last step
    gradient_norm: float     # mean since the last evaluation, before clipping
    seconds: float           # since the start, without the pauses between a stop and a --resume
    tokens_per_s: float      # of training since the last evaluation


@dataclass
class Progress:
    """How far a run has come."""
    step: int = 0                                    # steps done
    seconds: float = 0.0                             # spent on them, and on evaluations
    first_seconds: float = 0.0                       # on the first step, which may compile
    evaluation_seconds: float = 0.0                  # on the last evaluation
    lr: float = 0.0                                  # of the last step
    done: bool = False                               # has the last evaluation been made?
    lap_steps: int = 0                               # since the last evaluation: steps,
    lap_seconds: float = 0.0                         # their time,
    lap_losses: float = 0.0                          # the sum of their losses
    lap_norms: float = 0.0                           # and of their gradients' norms
    evaluations: list[Evaluation] = field(default_factory=list)
    samples: list[tuple[int, str]] = field(default_factory=list)     # (step, text)
    random: dict[str, Any] = field(default_factory=get_state)        # after the last step

    def best(self) -> Evaluation | None:
        """The evaluation with the lowest validation loss, the first of equals."""
        return min(self.evaluations, key=lambda e: e.val_loss, default=None)

    def after_step(self, loss: float, norm: float, lr: float, seconds: float) -> None:
        """Count a step."""
        self.step, self.lap_steps = self.step + 1, self.lap_steps + 1
        self.seconds, self.lap_seconds = self.seconds + seconds, self.lap_seconds + seconds
        self.lap_losses, self.lap_norms = self.lap_losses + loss, self.lap_norms + norm
        self.lr = lr
        if self.step == 1:
            self.first_seconds = seconds
        self.random = get_state()

    def after_evaluation(self, train_loss: float, val_loss: float, seconds: float, tokens: int) -> Evaluation:
        """Note an evaluation, and start counting anew; tokens: of a step."""
        self.seconds, self.evaluation_seconds = self.seconds + seconds, seconds
        speed = self.lap_steps * tokens / self.lap_seconds if self.lap_seconds else 0.0
        evaluation = Evaluation(self.step, self.lap_losses / self.lap_steps, train_loss, val_loss,
                                val_loss / math.log(2), self.lr, self.lap_norms / self.lap_steps,
                                self.seconds, speed)
        self.evaluations.append(evaluation)
        self.lap_steps, self.lap_seconds, self.lap_losses, self.lap_norms = 0, 0.0, 0.0, 0.0
        return evaluation

    def to_json(self) -> str:
        """As one line of JSON, with every bit of the numbers."""
        return json.dumps({**asdict(self), "evaluations": [list(e) for e in self.evaluations]})

    @classmethod
    def from_json(cls, line: str) -> Progress:
        """What `to_json` wrote; KeyError, TypeError or ValueError for anything else."""
        given = json.loads(line)
        if given.keys() != cls.__dataclass_fields__.keys():
            raise ValueError("progress: its fields are not those of this program")
        evaluations = [Evaluation(*numbers) for numbers in given.pop("evaluations")]
        samples = [(step, text) for step, text in given.pop("samples")]
        progress = cls(**given, evaluations=evaluations, samples=samples)
        for name, value in given.items():
            wanted = dict if name == "random" else type(getattr(cls, name))
            if type(value) is not wanted:
                raise TypeError(f"progress: {name} is {value!r}")
        numbers = [number for e in evaluations for number in e]
        numbers += [value for value in given.values() if not isinstance(value, (dict, bool))]
        if not all(type(n) in (int, float) and abs(n) < math.inf for n in numbers) or progress.step < 0:
            raise ValueError("progress: there are numbers in it that cannot be")
        if not all(type(step) is int and type(text) is str for step, text in samples):
            raise TypeError("progress: samples are pairs of a step and a text")
        return progress


@dataclass
class Run:
    """A model in training, and where its text came from."""
    config: Config
    tokenizer: CharTokenizer
    model: GPT
    optimizer: Any
    progress: Progress
    source: dict[str, str]                           # of the text: data, name, sha256; and the precision

    @classmethod
    def new(cls, config: Config, tokenizer: CharTokenizer, source: dict[str, str]) -> Run:
        """A run at its start, with weights drawn from minitensor's random numbers."""
        model = GPT(config, len(tokenizer))
        return cls(config, tokenizer, model, make_optimizer(model, config), Progress(), source)
