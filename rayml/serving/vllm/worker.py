"""What is put right in vLLM's worker processes, which read this module for their `worker_extension_cls`."""

from typing import Any

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.v1.sample.sampler import Sampler

from rayml.serving.vllm.mixing import with_top_tokens, without_strangers
from rayml.serving.vllm.parent import end_with_answerer


class Extension:
    """Adds nothing to the worker."""


_forward = Sampler.forward


def _mixed(self: Any, logits: Any, sampling_metadata: Any, *more: Any, **named: Any) -> Any:
    return _forward(self, logits, with_top_tokens(logits, sampling_metadata), *more, **named)


Sampler.forward = _mixed
# The prefill's kernels call it by the one name, the decode's by the other. On GPUs vLLM's own kernels skip such rows.
lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = without_strangers(lora_ops.bgmv_shrink)
end_with_answerer()
