"""Every kernel once, on sizes that leave remainders everywhere; as a script, prints a hash of each result."""
import hashlib
import json
import sys

import numpy as np

import kernels as K

N, C, T, H, D = 517, 131, 101, 3, 17         # several tasks, odd rows, the last vector of a row not full


def normal(*shape, dtype, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def embedding(dtype):
    ids = np.random.default_rng(1).integers(0, 50, N)
    weight, dy = normal(50, C, dtype=dtype), normal(N, C, dtype=dtype)
    return K.embedding_forward(ids, weight), K.embedding_backward(dy, ids, 50)


def layernorm(dtype):
    x, dy, gain, bias = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, C), (N, C), (C,), (C,)]))
    y, mean, rstd = K.layernorm_forward(x, gain, bias)
    return y, mean, rstd, *K.layernorm_backward(dy, x, gain, mean, rstd)


def matmul(dtype):
    a, b, weight = (normal(*s, dtype=dtype) for s in [(3, N, 2 * C), (2 * C, 67), (C, 2 * C)])
    return (K.matmul(a, b), K.matmul(a[0], weight, transpose_b=True), K.matmul(a, a, transpose_a=True),
            K.matmul(a[0], normal(2 * C, 4200, dtype=dtype)), K.column_sum(a[0]))


def linear(dtype):
    x, weight, bias = normal(N, 2 * C, dtype=dtype), normal(C, 2 * C, dtype=dtype), normal(C, dtype=dtype)
    return (K.linear_forward(x, weight)[0], *K.linear_forward(x, weight, bias, "gelu"),
            *K.linear_forward(x, weight, bias, "gelu_tanh"), *K.linear_forward(x, weight, bias, "relu2"))


def rotary(dtype):
    qkv, dy = normal(2, T, 3 * H * (D + 1), dtype=dtype), normal(2, T, 3 * H * (D + 1), dtype=dtype, seed=1)
    results = []
    for base, eps in ((100.0, 1e-6), (100.0, None), (None, 1e-6)):
        y, scales = K.rotary_forward(qkv, H, base, eps, 3)
        results += [y, scales, K.rotary_backward(dy, y, scales, H, base, 3)]
    return *results, *K.rotary_angles(T, 2 * D, 100.0, np.dtype(dtype), 3)


def attention(dtype):
    qkv, dout = normal(2, T, 3 * H * D, dtype=dtype), normal(2, T, H * D, dtype=dtype)
    results = []
    for causal, p in ((True, 0.0), (True, 0.3), (False, 0.3)):
        out, norms = K.attention_forward(qkv, H, causal, p, 7)
        results += [out, norms, K.attention_backward(dout, qkv, out, norms, H, causal, p, 7)]
    return tuple(results)


def cross_attention(dtype):
    S = T + 42
    q, dout = normal(2, T, H * D, dtype=dtype), normal(2, T, H * D, dtype=dtype, seed=1)
    kv = normal(2, S, 2 * H * D, dtype=dtype)
    results = []
    for causal, p, mask in ((True, 0.0, None), (False, 0.3, normal(2, S, dtype=dtype) > 0)):
        out, norms = K.cross_attention_forward(q, kv, H, causal, p, 7, mask)
        results += [out, norms, *K.cross_attention_backward(dout, q, kv, out, norms, H, causal, p, 7, mask)]
    return tuple(results)


def softmax(dtype):
    x, dy = normal(N, C, dtype=dtype), normal(N, C, dtype=dtype, seed=1)
    y, z = K.softmax_forward(x), K.log_softmax_forward(x)
    return y, z, K.softmax_backward(dy, y), K.log_softmax_backward(dy, z)


def gelu(dtype):
    x, dy = 3 * normal(N, C, dtype=dtype), normal(N, C, dtype=dtype, seed=1)
    return tuple(r for approximate in (False, True) for y, slope in [K.gelu_forward(x, approximate)]
                 for r in (y, slope, K.gelu_backward(dy, slope)))


def add(dtype):
    x, y = normal(N, C, dtype=dtype), normal(N, C, dtype=dtype, seed=1)
    return K.add(x, y), K.add(x, y, x)


def relu2(dtype):
    x, dy = normal(N, C, dtype=dtype), normal(N, C, dtype=dtype, seed=1)
    y = K.relu2_forward(x)
    return y, K.relu2_backward(dy, y)


def dropout(dtype):
    return (K.dropout(normal(N, C, dtype=dtype), 0.3, 5),)


def cross_entropy(dtype):
    logits, dlosses = normal(N, C, dtype=dtype), normal(N, dtype=dtype)
    targets = np.random.default_rng(1).integers(0, C, N)
    targets[::7] = -100
    losses, norms = K.cross_entropy_forward(logits, targets)
    return losses, norms, K.cross_entropy_backward(dlosses, logits, targets, norms)


def adamw(dtype):
    p, g, m, v = (normal(N, C, dtype=dtype, seed=seed) for seed in range(4))
    v *= v
    total = np.array(K.sum_of_squares([g, p]))
    lists = [[x[:100], x[100:]] for x in (p, g, m, v)]
    K.adamw(*lists, [0.1, 0.0], 3, 1e-3, 0.9, 0.99, 1e-8, scale=0.5)
    return total, p, m, v


def muon(dtype):
    shapes, parts = [(3 * 20, 33), (20, 33), (C, 33), (33, C)], [3, 1, 1, 1]
    p, g, b = ([normal(*shape, dtype=dtype, seed=seed) for shape in shapes] for seed in range(3))
    K.muon(p, g, b, parts, 1e-2, 0.9, 0.1, scale=0.5)
    return *p, *b, K.orthogonal(normal(3, 33, 20, dtype=dtype)), K.orthogonal(normal(3, 20, C, dtype=dtype))


CASES = [embedding, layernorm, matmul, linear, rotary, attention, cross_attention, softmax, gelu, relu2, add,
         dropout, cross_entropy, adamw, muon]


def hashes(dtype):
    """The hash of every result of every case."""
    return {case.__name__: [hashlib.sha256(result.tobytes()).hexdigest()[:16] for result in case(dtype)]
            for case in CASES}


if __name__ == "__main__":
    print(json.dumps(hashes(np.dtype(sys.argv[1]))))
