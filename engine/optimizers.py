"""The optimizers that --optimizer names. Another one is a function or class here and a line in OPTIMIZERS."""

from collections import defaultdict

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of x, x^3, x^5 on each singular value x; five times
MOMENTUM = 0.95


def adamw(model, groups, dtype, **options):
    return torch.optim.AdamW(groups, fused=True, **options)


def orthogonalized(matrices, dtype):
    """Bring all singular values of matrices (n, R, C), R <= C, near 1 (about 0.7 to 1.2); multiply in dtype."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)  # singular values up to 1
    x = x.to(dtype)  # (n, R, C)
    for _ in range(5):
        gram = x @ x.mT  # (n, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """Muon for the matrices of the transformer blocks, AdamW for all else.

    A matrix's step is its (Nesterov) momentum, orthogonalized (Jordan et al. 2024, "Muon", kellerjordan.github.io/
    posts/muon). The factor 0.2 sqrt(max(rows, columns)) makes it as long as AdamW's step, so both share learning rate
    and weight decay (Liu et al. 2025, arXiv:2502.16982, section 2.2). The weight (3 D, D) of queries, keys and values
    counts as three matrices. AdamW trains biases, LayerNorms, tokens, positions, patch embedding, decoder.embed, heads.

    Args:
        model: its blocks are in modules named transformer.
        groups: its parameter groups, as AdamW takes them; they are split by kind of parameter. options: AdamW's.
        dtype: of the matrix products; bf16, which Jordan used, is at least 2.7 times as fast (width 64) on a Zen 4.
    """

    def __init__(self, model, groups, dtype, **options):
        self.dtype = dtype
        blocks = [pair for pair in model.named_parameters() if "transformer." in pair[0] and pair[1].ndim == 2]
        matrices = {weight: 3 if "qkv" in name else 1 for name, weight in blocks}
        split = []
        for group in groups:
            for count in (0, 1, 3):  # matrices in each weight; 0: AdamW's
                params = [p for p in group["params"] if matrices.get(p, 0) == count]
                split += [{**group, "params": params, "matrices": count}] if params else []
        super().__init__(split, fused=True, **options)
        self._step_supports_amp_scaling = False  # GradScaler unscales all gradients; fused AdamW only its own

    @torch.no_grad()
    def step(self):
        """Step; the blocks' matrices have no gradient afterwards. Those of one shape, or its transpose, go together."""
        stacks = defaultdict(list)
        for group in self.param_groups:
            lr, count = group["lr"], group["matrices"]
            for p in group["params"]:
                if not count or p.grad is None:
                    continue
                if not self.state[p]:  # AdamW looks for a step in each state that it loads
                    self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
                wide = p.shape[0] // count <= p.shape[1]
                for views in zip(*(x.chunk(count) for x in (p, p.grad, self.state[p]["momentum"])), strict=True):
                    views = views if wide else [x.T for x in views]  # (R, C) each
                    stacks[views[0].shape].append((*views, 1 - lr * group["weight_decay"], -lr))
                p.grad = None  # so that AdamW passes it over
        for shape, entries in stacks.items():
            weights, grads, momenta, kept, rates = zip(*entries, strict=True)
            torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
            updates = torch.stack(torch._foreach_lerp(grads, momenta, MOMENTUM))  # (n, R, C)
            torch._foreach_mul_(weights, kept)
            scales = [0.2 * shape[1] ** 0.5 * rate for rate in rates]
            torch._foreach_add_(weights, torch._foreach_mul(orthogonalized(updates, self.dtype).unbind(), scales))
        super().step()


OPTIMIZERS = {"adamw": adamw, "muon": Muon}
