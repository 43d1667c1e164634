"""Which neuron gets which precision: the mix, scores, and the assignment by rank.

A neuron's score is |act(gate . x) * (up . x)| * ||down column||: its share of the layer's output.
On SwiGLU models it is the best signal known (FloE, table 1), and it needs no trained predictor.
Knows nothing about where the neurons lie.
"""

from dataclasses import dataclass

from torch import Tensor

from m2c.errors import UsageError

PRECISIONS = ("fp16", "int8", "int4")  # best first, as in --mix
LEVELS = {"int4": 1, "int8": 2, "fp16": 3}  # planes that are read; 0: dropped


@dataclass(frozen=True)
class Mix:
    """Percent of a layer's neurons at FP16, INT8 and INT4; `drop` percent, lowest, not at all."""

    fp16: float
    int8: float
    int4: float
    drop: float = 0.0

    def __post_init__(self) -> None:
        parts = (self.fp16, self.int8, self.int4)
        if any(not 0 <= part <= 100 for part in (*parts, self.drop)) or self.drop >= 100:
            raise UsageError(f"mix {self}: every share must be between 0 and 100 percent")
        if abs(sum(parts) - 100) > 1e-6:
            message = f"mix {self} adds up to {sum(parts):g}, not to 100 percent"
            raise UsageError(message, "write it like 5/15/80 (FP16/INT8/INT4)")

    @classmethod
    def parse(cls, text: str, drop: float = 0.0) -> "Mix":
        """From `FP16/INT8/INT4`, for example 5/15/80."""
        try:
            shares = [float(part) for part in text.split("/")]
        except ValueError:
            shares = []
        if len(shares) != 3:
            raise UsageError(f"{text!r} is not a mix", "write it like 5/15/80 (FP16/INT8/INT4)")
        return cls(shares[0], shares[1], shares[2], drop)

    @classmethod
    def of_percent(cls, percent: tuple[int, ...], drop: float = 0.0) -> "Mix":
        """From the three shares of a manifest."""
        return cls(percent[0], percent[1], percent[2], drop)

    def __str__(self) -> str:
        text = f"{self.fp16:g}/{self.int8:g}/{self.int4:g}"
        return f"{text} drop {self.drop:g}" if self.drop else text

    def among(self, experts: int) -> "Mix":
        """The mix of so many experts of a token: whole ones, shares rounded half up, best first.

        The result stays as it is when it is asked for again."""
        fp16 = min(_half_up(experts * self.fp16 / 100), experts)
        int8 = min(_half_up(experts * self.int8 / 100), experts - fp16)
        shares = [100 * count / experts for count in (fp16, int8, experts - fp16 - int8)]
        return Mix(shares[0], shares[1], shares[2], self.drop)

    def by_rank(self, experts: int) -> tuple[int, ...]:
        """The level of each of so many experts of a token, that of the largest router weight
        first."""
        mix = self.among(experts)
        shares = {p: round(experts * getattr(mix, p) / 100) for p in PRECISIONS}
        return tuple(LEVELS[p] for p in PRECISIONS for _ in range(shares[p]))

    @property
    def best(self) -> str:
        """The highest precision that anything has."""
        return next(p for p in PRECISIONS if getattr(self, p))

    @property
    def floor(self) -> str:
        """The precision every neuron is read at, and scored with."""
        if self.int4 or self.fp16 == self.int8 == 0:
            return "int4"
        return "int8" if self.int8 else "fp16"

    @property
    def dense(self) -> str:
        """The precision of attention, embeddings and head that goes with this mix."""
        if self.fp16 == 100:
            return "fp16"
        return "int4" if self.int4 == 100 else "int8"

    @property
    def upgrades(self) -> tuple[str, ...]:
        """Planes above the floor that some neurons need."""
        above = [p for p in ("int8", "fp16") if getattr(self, p) and LEVELS[p] > LEVELS[self.floor]]
        return tuple(above)

    @property
    def is_uniform(self) -> bool:
        return not self.upgrades and not self.drop

    def counts(self, neurons: int) -> dict[str, int]:
        """Neurons of a layer at each precision, and dropped."""
        drop = round(neurons * self.drop / 100)
        fp16 = min(round(neurons * self.fp16 / 100), neurons - drop)
        int8 = min(round(neurons * self.int8 / 100), neurons - drop - fp16)
        return {"fp16": fp16, "int8": int8, "int4": neurons - drop - fp16 - int8, "drop": drop}

    def ranks(self, neurons: int) -> list[tuple[int, int]]:
        """(how many of the best, level) for `kernels.rank`; later ones take from earlier ones."""
        counts = self.counts(neurons)
        found = [(neurons - counts["drop"], LEVELS[self.floor])]
        if "int8" in self.upgrades:
            found.append((counts["fp16"] + counts["int8"], LEVELS["int8"]))
        if "fp16" in self.upgrades:
            found.append((counts["fp16"], LEVELS["fp16"]))
        return found


def assumed_mix(active: int) -> Mix:
    """What pack usually finds, for models that are not packed yet; active: experts of a token, of
    which no more than as many are taken as stay within the same bits."""
    share = 100 * (active // 4) / active if active else 25
    return Mix(0, share, 100 - share)


def _half_up(value: float) -> int:
    return int(value + 0.5 + 1e-9)  # 8 * 6.25 / 100 is a half whatever its last bit


def scores_of(activations: Tensor, down_norm: Tensor) -> Tensor:
    """activations [tokens, neurons] f32 and column norms [neurons] to scores, same shape."""
    return activations.abs() * down_norm


def bits_per_weight(mix: Mix, exact_bits: float) -> float:
    """Average stored bits read per FFN weight of a token, the floor included."""
    kept = {"int4": 4.5, "int8": 8.5, "fp16": 8.5 + exact_bits}
    counts = mix.counts(100_000)
    counts[mix.floor] += counts["drop"]  # a dropped neuron was read to be scored
    return sum(kept[p] * counts[p] for p in kept) / 100_000
