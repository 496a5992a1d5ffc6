"""What stands in for the parts of a pipeline around its transformer: shapes and dtypes of what they would give.

A text encoder is told by its configuration: how long its output is stands in its input, how wide in the configuration.
What it would compute is nothing that the transformer's shapes depend on. Its values are zeros on the CPU, where a
pipeline may look at them and at the tokenizer's masks, and cut both to the length of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutput
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

CPU = torch.device("cpu")


class TextEncoder(torch.nn.Module):
    """Stands in for a text encoder of transformers: takes what it takes, and gives zeros of the shapes that it gives.

    Args:
        kind: the name of the encoder's class, by whose ending its first output is told.
        config: of the encoder; for its own, one that also has others', ``get_text_config`` finds the text's.
        dtype: of its output.

    """

    def __init__(self, kind: str, config: PretrainedConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.config, self.dtype, self.device = kind, config, dtype, CPU

    @staticmethod
    def knows(config: PretrainedConfig) -> bool:
        """Whether a configuration says all that is needed: it is that of a text model, and gives its width."""
        text = config.get_text_config()
        return all(hasattr(text, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers"))

    def forward(
        self, input_ids: Any = None, *_: Any, inputs_embeds: Any = None, return_dict: bool = True, **__: Any
    ) -> Any:
        """Give zeros: (batch, length, width), one such for each layer, and one vector a text, pooled or projected."""
        batch, length = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
        text = self.config.get_text_config()
        last = self._zeros(batch, length, text.hidden_size)
        layers = (last,) * (text.num_hidden_layers + 1)
        output: Any
        if self.kind.endswith("WithProjection"):
            projected = self._zeros(batch, text.projection_dim)
            output = CLIPTextModelOutput(text_embeds=projected, last_hidden_state=last, hidden_states=layers)
        elif self.kind.endswith(("ForCausalLM", "ForConditionalGeneration")):
            output = CausalLMOutput(logits=self._zeros(batch, length, text.vocab_size), hidden_states=layers)
        else:
            pooled = self._zeros(batch, text.hidden_size)
            output = BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=layers)
        return output if return_dict else output.to_tuple()

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def give_zeros(module: torch.nn.Module) -> torch.nn.Module:
    """Have a module on the meta device take tensors of any device, and give zeros on the CPU in place of meta tensors.

    Returns:
        The module itself.

    """

    def take(_: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return mapped(on_meta, args), mapped(on_meta, kwargs)

    def give(_: torch.nn.Module, __: Any, ___: Any, output: Any) -> Any:
        return mapped(lambda item: torch.zeros_like(item, device=CPU), output)

    module.register_forward_pre_hook(take, with_kwargs=True)
    module.register_forward_hook(give, with_kwargs=True)
    return module


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same size, strides and dtype, without values."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """What ``value`` holds, each tensor in it replaced; it may be nested in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        if type(value) is dict:
            return {key: mapped(function, item) for key, item in value.items()}
        return type(value)(**{key: mapped(function, item) for key, item in value.items()})  # an output of a library's
    if type(value) in (tuple, list):
        return type(value)(mapped(function, item) for item in value)
    return value
