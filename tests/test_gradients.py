"""A graph has the gradients of its model, or there is none."""

from __future__ import annotations

from typing import Any

import torch
from made import X, agrees, module, refused
from torch.utils import checkpoint

import lora_fx


class Clamp(torch.autograd.Function):
    """Clamps, and lets gradients through."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-100, 100)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Square(torch.autograd.Function):
    """Squares, with its own derivative."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = context.saved_tensors
        return 2 * x * gradient


class SquareWithSetup(Square):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x * x

    @staticmethod
    def setup_context(context: Any, inputs: Any, output: Any) -> None:
        context.save_for_backward(*inputs)


class NaNBackward(Square):
    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


clamp, square, square_with_setup, nan_backward = Clamp.apply, Square.apply, SquareWithSetup.apply, NaNBackward.apply


def test_a_function_whose_backward_agrees_where_it_was_tried_is_refused() -> None:
    refused(module(lambda self, x: clamp(self.lin(x))), r"autograd functions.*Clamp is not known to be the derivative")
    refused(
        module(lambda self, x: clamp(x)),
        "Clamp is not known to be the derivative",
        inputs=(X.clone().requires_grad_(),),
    )
    refused(module(lambda self, x: nan_backward(self.lin(x))), "NaNBackward is not known to be the derivative")
    agrees(module(lambda self, x: clamp(self.lin(x))), inference=True)


def test_a_function_whose_backward_is_its_derivative_is_traced() -> None:
    agrees(module(lambda self, x: square(self.lin(x)) + square_with_setup(self.lin(x))))


def test_an_operator_with_a_backward_of_its_own_keeps_it() -> None:
    @torch.library.custom_op("lora_fx_tests::through", mutates_args=())
    def through(x: torch.Tensor) -> torch.Tensor:
        return x.round()

    through.register_fake(torch.empty_like)
    through.register_autograd(lambda context, gradient: gradient)
    graph = agrees(module(lambda self, x: through(self.lin(x)))).requires_grad_(True)
    assert torch.autograd.grad(graph(X).sum(), graph.lin.bias)[0].tolist() == [3.0] * 4


def test_a_function_that_is_made_within_the_model_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return type("Local", (Square,), {}).apply(self.lin(x))  # type: ignore[attr-defined, no-any-return]

    refused(module(forward), "Local is not known to be the derivative")


def test_gradients_that_bypass_the_model_are_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            scale = self.lin(x).mean()
        return x * scale

    refused(module(forward), "inference=True")


def test_a_model_that_sets_what_requires_a_gradient_is_traced() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None]
        if self.training:
            x.requires_grad = True  # as Wav2Vec2 does
        return self.lin(x)

    agrees(module(forward))


def test_a_model_without_gradients_is_traced() -> None:
    agrees(module(lambda self, x: self.lin(x).argmax(-1)))


def test_reentrant_checkpoints_are_refused_and_others_traced() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return checkpoint.checkpoint(self.lin, x, use_reentrant=self.reentrant) * 2  # type: ignore[no-any-return]

    refused(module(forward, reentrant=True), "inference=True", inputs=(X.clone().requires_grad_(),))
    agrees(module(forward, reentrant=False))


def test_hooks_on_gradients_are_refused() -> None:
    def hooking(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(x)
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient.clamp(-100, 100))
        return h

    refused(module(hooking), r"hooks the gradients of .*test_gradients\.py:\d+.*inference=True")
    agrees(module(hooking), inference=True)
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        model = module(lambda self, x: self.lin(x))
        getattr(model.lin.weight, register)(lambda _: None)
        refused(model, r"hooks the gradients of parameter 'lin.weight'")
    model = module(lambda self, x: self.lin(x))
    model.lin.register_full_backward_hook(lambda *_: None)
    refused(model, r"hooks the gradients of module 'lin'")


def test_a_write_without_gradients_to_what_has_one_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(x)
        with torch.no_grad():
            h.view(-1).clamp_(min=0)
        return h

    refused(module(forward), r"writes to a tensor under torch\.no_grad\(\).*test_gradients\.py:\d+")
    agrees(module(forward), inference=True)


def test_regions_without_gradients_keep_none_wherever_the_trace_is_made() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            frequencies = torch.fft.fft(self.lin(x))
        return torch.fft.ifft(frequencies).real * self.lin(x)

    model = module(forward)
    for outside in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with outside():
            graph = lora_fx.trace(model, (X,))
        found = []
        for each in (model, graph.requires_grad_(True)):
            parameters = dict(each.named_parameters())
            found.append(torch.autograd.grad(each(X).sum(), [parameters["lin.weight"], parameters["lin.bias"]]))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
