"""GPTQ, algorithm 1 of Frantar et al. (arXiv 2210.17323), unblocked and literal."""

import torch


def gptq_codes(W, H, fitted):
    """Quantize column by column, spreading each error over the columns not yet visited.

    The upper Cholesky factor R of H^-1 gives the update  w_k: -= (w_k - q_k) / R_kk * R_k,k:.
    """
    work, codes = W.clone(), []
    R = torch.linalg.cholesky(torch.linalg.inv(H)).T
    for k in range(W.shape[1]):
        code = fitted.encode(work[:, k : k + 1], k)
        error = (work[:, k : k + 1] - fitted.decode(code, k).to(W.dtype)) / R[k, k]
        work[:, k:] -= error @ R[k : k + 1, k:]
        codes.append(code)
    return torch.cat(codes, dim=1)
