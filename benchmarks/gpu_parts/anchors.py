"""Published figures that a result is put beside: other software, and mostly another device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Anchor:
    """A figure to compare with.

    Args:
        text: The figure, short enough for a line.
        source: Whose it is, and on which device.
    """

    text: str
    source: str


_JSD = "the JSD head, N 8,192 × D 4,096 × V 128,256, on an A100"
_CE = "the cross-entropy head, V 151,936, on an H100"

ANCHORS = {
    "jsd liger": Anchor("A100: 129 ms, 2.0 GB", f"{_JSD}, Liger"),
    "jsd formula": Anchor("A100: 195 ms, 19.0 GB", f"{_JSD}, torch"),
    "ce product": Anchor("H100: 42 ms", f"{_CE}, the bare product"),
    "ce formula": Anchor("H100: 59 ms, 19.9 GiB", f"{_CE}, the formula"),
    "ce trl": Anchor("H100: 167 ms, 13.1 GiB", f"{_CE}, TRL's tiles"),
    "ce liger": Anchor("H100: 192 ms, 6.1 GiB", f"{_CE}, Liger"),
    "step trl": Anchor("TRL: 26.8k tokens/s, 27 %", "TRL's distillation of a 1B student: tokens/s and MFU"),
    "quickstart cpu": Anchor(
        "CPU: 0.65→0.40, 0.62→0.73, 27.6→37.2",
        "the quickstart on two CPU cores, two passes over 386 prompts (README.md): KL, acceptance and ROUGE-L",
    ),
    "compare cpu": Anchor(
        "CPU: kd 2.47, distillm2 2.60",
        "KL of the comparison of eleven methods on two CPU cores (docs/compare.md)",
    ),
}


def anchor_text(key: str | None) -> str:
    """The short text of an anchor, or nothing."""
    return ANCHORS[key].text if key in ANCHORS else ""
