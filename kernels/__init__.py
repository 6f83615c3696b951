"""numba kernels, in the order in which a step of training meets them: ndarrays in, ndarrays out.

B batch, T time, C width, H heads, D head width, V vocabulary; kernels see N rows by C. All arrays are
C-contiguous, float32 or float64. Each result has the same bits on any number of threads, in memory that
`kernels.memory` recycles.
"""
from kernels.adamw import adamw, sum_of_squares
from kernels.add import add
from kernels.attention import (
    attention_backward,
    attention_forward,
    cross_attention_backward,
    cross_attention_forward,
)
from kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward
from kernels.dropout import dropout, dropout_mask, flat_mask, keep_below
from kernels.embedding import embedding_backward, embedding_forward
from kernels.gelu import gelu_backward, gelu_forward
from kernels.jit import get_num_threads, set_num_threads
from kernels.layernorm import layernorm_backward, layernorm_forward
from kernels.matmul import column_sum, get_matmul_precision, linear_forward, matmul, set_matmul_precision
from kernels.muon import muon, orthogonal
from kernels.relu2 import relu2_backward, relu2_forward
from kernels.rotary import rotary_angles, rotary_backward, rotary_forward
from kernels.softmax import log_softmax_backward, log_softmax_forward, softmax_backward, softmax_forward

__all__ = [  # noqa: RUF022 (in the order of a step)
    "embedding_forward", "embedding_backward",
    "layernorm_forward", "layernorm_backward",
    "matmul", "linear_forward", "column_sum",
    "rotary_forward", "rotary_backward", "rotary_angles",
    "attention_forward", "attention_backward", "cross_attention_forward", "cross_attention_backward",
    "softmax_forward", "softmax_backward", "log_softmax_forward", "log_softmax_backward",
    "gelu_forward", "gelu_backward", "relu2_forward", "relu2_backward",
    "dropout", "dropout_mask", "flat_mask", "keep_below",
    "add",
    "cross_entropy_forward", "cross_entropy_backward",
    "sum_of_squares", "adamw", "muon", "orthogonal",
    "set_matmul_precision", "get_matmul_precision", "set_num_threads", "get_num_threads",
]  # fmt: skip
