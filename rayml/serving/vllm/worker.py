"""Fixes in vLLM's worker processes, which import this module because of `worker_extension_cls`."""

from typing import Any

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.v1.sample.sampler import Sampler

from rayml.serving.vllm.mixing import with_top_tokens, without_base_rows
from rayml.serving.vllm.parent import end_with_answerer


class Extension:
    """Adds nothing to the worker."""


_forward = Sampler.forward


def _forward_with_top_tokens(self: Any, logits: Any, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
    return _forward(self, logits, with_top_tokens(logits, sampling_metadata), *args, **kwargs)


Sampler.forward = _forward_with_top_tokens
# Prefill and decode import the kernel under different names. On GPUs vLLM's kernels skip the rows of the base.
lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = without_base_rows(lora_ops.bgmv_shrink)
end_with_answerer()
