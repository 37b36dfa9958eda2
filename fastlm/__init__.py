"""fastlm: fused kernels for training language models in PyTorch."""

from . import nn
from .dispatch import backends, explain, use_backend
from .ops.attention.mask import AttnMask
from .ops.attention.merge import merge_attention
from .ops.attention.op import attention
from .ops.cross_entropy.op import cross_entropy
from .ops.decode_attention.op import decode_attention
from .ops.embedding_gru.public import embedding_gru
from .ops.embedding_gru.stack import gru
from .ops.embedding_gru.token_plan import TokenPlan, token_plan
from .ops.generation.public import Generated, generate, generation_logprobs
from .ops.linear.op import linear
from .ops.linear_cross_entropy.op import linear_cross_entropy
from .ops.linear_cross_entropy.options import LinearCrossEntropyOptions
from .ops.linear_kl_div.op import linear_kl_div
from .ops.linear_policy_loss.op import linear_policy_loss
from .ops.linear_topk_kl_div.op import linear_topk_kl_div
from .ops.policy_loss.advantages import gae, group_advantages, leave_one_out_advantages
from .ops.policy_loss.op import kl_estimate, policy_loss
from .ops.preference.op import (
    cpo_loss,
    dpo_loss,
    kto_loss,
    orpo_loss,
    reward_loss,
    simpo_loss,
)
from .ops.sampling.op import sample
from .ops.token_logprobs.op import (
    TokenLogprobs,
    entropy,
    linear_token_logprobs,
    token_logprobs,
)
from .packing import PackedRows, pack_documents

__version__ = "0.1.0"

__all__ = [
    "AttnMask",
    "Generated",
    "LinearCrossEntropyOptions",
    "PackedRows",
    "TokenLogprobs",
    "TokenPlan",
    "attention",
    "backends",
    "cpo_loss",
    "cross_entropy",
    "decode_attention",
    "dpo_loss",
    "embedding_gru",
    "entropy",
    "explain",
    "gae",
    "generate",
    "generation_logprobs",
    "group_advantages",
    "gru",
    "kl_estimate",
    "kto_loss",
    "leave_one_out_advantages",
    "linear",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_policy_loss",
    "linear_token_logprobs",
    "linear_topk_kl_div",
    "merge_attention",
    "nn",
    "orpo_loss",
    "pack_documents",
    "policy_loss",
    "reward_loss",
    "sample",
    "simpo_loss",
    "token_logprobs",
    "token_plan",
    "use_backend",
]
