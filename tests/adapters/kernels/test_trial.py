"""The trial of a LoRA kernel: correct kernels pass, and wrong or failing ones do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.kernels import Segment
from adapters.kernels.segmented import segmented_lora
from adapters.kernels.trial import what_is_wrong
from adapters.pool.site_pool import SitePool

CPU = torch.device("cpu")


class Right:
    def foreach(
        self, ys: Sequence[Tensor], x: Tensor, pools: Sequence[SitePool], segments: list[Segment]
    ) -> None:
        for y, pool in zip(ys, pools, strict=True):
            segmented_lora(y, x, pool, segments)


class WrongInPrompts(Right):
    def foreach(
        self, ys: Sequence[Tensor], x: Tensor, pools: Sequence[SitePool], segments: list[Segment]
    ) -> None:
        super().foreach(ys, x, pools, [one for one in segments if one.stop - one.start < 16])


class Broken:
    def foreach(self, *_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")


def test_a_kernel_that_equals_the_reference_passes() -> None:
    assert what_is_wrong(Right(), CPU, torch.float32, 16) is None


def test_a_kernel_that_is_wrong_in_some_steps_does_not_pass() -> None:
    assert (what_is_wrong(WrongInPrompts(), CPU, torch.float32, 16) or "").startswith("its results are wrong")


def test_a_kernel_that_fails_does_not_pass_and_the_reason_is_one_line() -> None:
    assert what_is_wrong(Broken(), CPU, torch.float32, 16) == "it fails: Failed to find C compiler."
