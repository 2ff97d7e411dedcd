"""A step of two language models with and without logits: `python benchmarks/without_logits.py` (needs transformers).

KL and cross-entropy in a Distiller, forward and backward, of two small Llamas: `KLLoss` with the default task loss on
formed logits, against `LinearLoss` at the last norm with `logits_to_keep=1`. Both give the same loss. Memory is the
most that a step holds beyond what was there before it, the parameters' gradients included; the ratio of times is the
median over repetitions in which both are timed in turn.
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill import Distiller, KLLoss, LinearLoss, Term, next_tokens
from measure import describe_machine, peak_extra_bytes, quartiles, settle_allocator, time_steps, wall_clock


def llama(width: int, vocabulary: int) -> LlamaForCausalLM:
    """A causal language model of two layers with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


def main(arguments: list[str] | None = None) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, nargs=2, default=(4, 512), help="sequences and their length")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--widths", type=int, nargs=2, default=(64, 128), help="of student and teacher")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args(arguments)
    settle_allocator()
    torch.manual_seed(0)
    student, teacher = (llama(width, options.vocabulary) for width in options.widths)
    tokens = torch.randint(options.vocabulary, tuple(options.tokens))
    target, mask = next_tokens(tokens)
    formed = Distiller(student, teacher, KLLoss())
    linear = LinearLoss(KLLoss(), student.lm_head, teacher.lm_head, cross_entropy=1.0)
    without = Distiller(student, teacher, Term(linear, at="model.norm"), task_loss=None)
    values = {}

    def step(name: str) -> None:
        student.zero_grad(set_to_none=True)
        inputs = {"input_ids": tokens} if name == "formed" else {"input_ids": tokens, "logits_to_keep": 1}
        out = (formed if name == "formed" else without)(inputs, target, mask=mask)
        torch.autograd.backward(out.loss)
        values[name] = float(out.loss.detach())

    steps = {"formed": lambda: step("formed"), "without": lambda: step("without")}
    times = time_steps(steps, options.repetitions + 1, 1, wall_clock(tokens.device))
    pairs = zip(times["formed"][1:], times["without"][1:], strict=True)  # the first of each sets things up
    middle, low, high = quartiles([a / b for a, b in pairs])
    memory = []
    for name in steps:
        student.zero_grad(set_to_none=True)
        peak = peak_extra_bytes(steps[name], tokens.device)
        memory.append("unknown" if peak is None else f"{peak / 1e6:.0f} MB")
    print(f"torch {torch.__version__}, {describe_machine(tokens.device)}, n={options.repetitions}")
    print(f"loss {values['formed']:.6f} with logits, {values['without']:.6f} without")
    print(f"memory {memory[0]} with logits, {memory[1]} without; gradients are {_gradients(student):.0f} MB of it")
    print(f"time with logits / without: {middle:.2f} [{low:.2f}, {high:.2f}]")


def _gradients(model: torch.nn.Module) -> float:
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters()) / 1e6


if __name__ == "__main__":
    main()
