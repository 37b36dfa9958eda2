"""fastlm: fused kernels for training language models in PyTorch."""

from . import nn
from .dispatch import backends, explain, use_backend
from .ops.attention.mask import AttnMask
from .ops.attention.op import attention
from .ops.embedding_gru.public import TokenPlan, embedding_gru, gru, token_plan
from .ops.policy_loss.advantages import gae, group_advantages, leave_one_out_advantages
from .ops.policy_loss.op import kl_estimate, policy_loss
from .ops.sampling.op import sample

__version__ = "0.1.0"

__all__ = [
    "AttnMask",
    "TokenPlan",
    "attention",
    "backends",
    "embedding_gru",
    "explain",
    "gae",
    "group_advantages",
    "gru",
    "kl_estimate",
    "leave_one_out_advantages",
    "nn",
    "policy_loss",
    "sample",
    "token_plan",
    "use_backend",
]
