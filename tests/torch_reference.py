"""DINOv2's training step in PyTorch: what step.py times our step against.

`Reference` states the step of DINOv2 (`ssl_meta_arch.py` and what it calls) with
today's fast PyTorch parts: scaled_dot_product_attention, fused AdamW, foreach EMA, the
blocks run once, one pass of the head over all rows. test_benchmarks.py compares two of
its steps with the reference's own. It runs where its tensors are.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

STUDENT_TEMP = 0.1
CENTER_MOMENTUM = 0.9
CLIP = 3.0


def residual(x, branch, rate: float):
    """x + branch(x), with a rate on a random subset of the rows (drop path).

    DINOv2's `drop_add_residual_stochastic_depth`.
    """
    if not rate:
        return x + branch(x)
    b = len(x)
    m = max(int(b * (1 - rate)), 1)
    rows = torch.randperm(b, device=x.device)[:m]
    update = branch(x[rows]).flatten(1).to(x.dtype)
    return torch.index_add(x.flatten(1), 0, rows, update, alpha=b / m).view_as(x)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale."""

    drop_path = 0.0

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)}
        )
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(dim)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(dim)})

    def attention(self, x):
        """The first branch, [B,T,D] -> [B,T,D]."""
        b, t, d = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        return self.attn["proj"](y) * self.ls1["gamma"]

    def perceptron(self, x):
        """The second branch, [B,T,D] -> [B,T,D]."""
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return y * self.ls2["gamma"]

    def forward(self, x):
        """[B,T,D] -> [B,T,D]."""
        x = residual(x, self.attention, self.drop_path)
        return residual(x, self.perceptron, self.drop_path)


class Backbone(nn.Module):
    """ViT with registers; parameters take the names of the state dict it is made of."""

    def __init__(self, state: dict, heads: int):
        super().__init__()
        dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
        depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
        conv = nn.Conv2d(channels, dim, patch, patch)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        for name in ("cls_token", "pos_embed", "register_tokens", "mask_token"):
            self.register_parameter(name, nn.Parameter(torch.empty_like(state[name])))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.load_state_dict(state)

    def positions(self, side: int):
        """pos_embed on a grid of side x side, bicubic with DINOv2's offset of 0.1."""
        native = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if side == native:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].view(1, native, native, -1).permute(0, 3, 1, 2)
        scale = (side + 0.1) / native
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def forward(self, images, masks=None):
        """Images [B,C,S,S] -> final-normed CLS [B,D] and patches [B,N,D]."""
        x = self.patch_embed["proj"](images)
        side, x = x.shape[-1], x.flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self.positions(side)
        registers = self.register_tokens.expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + registers.shape[1] :]


class Head(nn.Module):
    """MLP, L2 normalisation, weight-normalised prototypes."""

    def __init__(self, state: dict):
        super().__init__()
        layers = []
        for i in (0, 2, 4):
            rows, columns = state[f"mlp.{i}.weight"].shape
            layers += [nn.Linear(columns, rows), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        names = ("weight_g", "weight_v")
        parts = {n: torch.empty_like(state[f"last_layer.{n}"]) for n in names}
        self.last_layer = nn.ParameterDict(parts)
        self.load_state_dict(state)

    def forward(self, x):
        """[R,D] -> logits [R,K]."""
        x = F.normalize(self.mlp(x), eps=1e-12)
        layer = self.last_layer
        return F.linear(x, torch._weight_norm(layer["weight_v"], layer["weight_g"], 0))


def koleo(x):
    """-mean ln distance to the nearest neighbour of unit rows [b,D], in float32."""
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), eps=1e-8)
        with torch.no_grad():
            dots = x @ x.T
            dots.fill_diagonal_(-1)
            nearest = dots.argmax(1)
        distance = F.pairwise_distance(x, x[nearest], eps=1e-8)
        return -torch.log(distance + 1e-8).mean()


def multipliers(name: str, depth: int) -> tuple[float, float]:
    """(learning rate, weight decay) multipliers, DINOv2 `param_groups.py`."""
    decayed = not (name.endswith("bias") or "norm" in name or "gamma" in name)
    part, _, rest = name.partition(".")
    if part == "dino_head" or rest.startswith("norm"):
        return 1.0, float(decayed)
    layer = int(rest.split(".")[1]) + 1 if rest.startswith("blocks.") else 0
    rate = 0.9 ** (depth + 1 - layer)
    return rate * (0.2 if "patch_embed" in rest else 1.0), float(decayed)


def split(state: dict, prefix: str) -> dict:
    """The entries below prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


class Reference:
    """Student, EMA teacher, losses and optimiser; `step` is one training step.

    state: {'backbone.*', 'dino_head.*'} tensors of the student; the teacher starts as
    teacher_scale times the student. drop_path: the student's rate. half: networks and
    losses under bfloat16 autocast.
    """

    def __init__(
        self,
        state: dict,
        heads: int,
        teacher_scale: float = 1.0,
        *,
        drop_path: float = 0.0,
        half: bool = False,
    ):
        parts = {
            "backbone": Backbone(split(state, "backbone."), heads),
            "dino_head": Head(split(state, "dino_head.")),
        }
        self.student, self.half = nn.ModuleDict(parts), half
        self.student.to(state["backbone.cls_token"].device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for block in self.student["backbone"].blocks:
            block.drop_path = drop_path
        torch._foreach_mul_(list(self.teacher.parameters()), teacher_scale)
        gain = self.student["dino_head"].last_layer["weight_g"].detach()
        zeros = torch.zeros_like(gain[:, 0])
        self.centers = {"dino": zeros, "ibot": zeros}
        depth, groups = len(self.student["backbone"].blocks), {}
        for name, parameter in self.student.named_parameters():
            key = (*multipliers(name, depth), "last_layer" in name)
            groups.setdefault(key, []).append(parameter)
        self.groups = list(groups)
        self.optimizer = torch.optim.AdamW(
            [{"params": p} for p in groups.values()], betas=(0.9, 0.999), fused=True
        )
        self.norms: dict[str, float] = {}

    @torch.no_grad()
    def targets(self, batch, temp: float):
        """(CLS probabilities [2,B,K], masked patches' [M,K]); moves the centers."""
        cls_token, patches = self.teacher["backbone"](batch["global_crops"])
        masked = patches.flatten(0, 1)[batch["mask_indices"]]
        logits = self.teacher["dino_head"](torch.cat([cls_token, masked]))
        parts = {"dino": logits[: len(cls_token)], "ibot": logits[len(cls_token) :]}
        probs = {}
        for name, z in parts.items():
            probs[name] = F.softmax((z - self.centers[name]) / temp, -1)
            self.centers[name] = torch.lerp(
                z.mean(0, dtype=torch.float32), self.centers[name], CENTER_MOMENTUM
            )
        return probs["dino"].unflatten(0, (2, -1)), probs["ibot"]

    def losses(self, batch, temp: float) -> dict:
        """The four weighted terms."""
        probs, patch_probs = self.targets(batch, temp)
        images, local = batch["global_crops"], batch["local_crops"]
        cls_token, patches = self.student["backbone"](images, batch["masks"])
        local_cls, _ = self.student["backbone"](local)
        masked = patches.flatten(0, 1)[batch["mask_indices"]]
        rows = torch.cat([cls_token, local_cls, masked])
        log_p = F.log_softmax(self.student["dino_head"](rows) / STUDENT_TEMP, -1)
        sizes = [len(cls_token), len(local_cls), len(masked)]
        global_log_p, local_log_p, patch_log_p = log_p.split(sizes)
        b = probs.shape[1]
        views = len(local) // b
        terms = 2 + 2 * views
        across = -(probs.flip(0).flatten(0, 1) * global_log_p).sum() / b
        to_local = -(probs.sum(0) * local_log_p.unflatten(0, (views, b))).sum() / b
        ibot = -((patch_probs * patch_log_p).sum(-1) * batch["mask_weights"]).sum()
        return {
            "dino_local": to_local / terms,
            "dino_global": across / terms,
            "koleo": 0.1 * sum(koleo(x) for x in cls_token.chunk(2)),
            "ibot": ibot / len(images),
        }

    def step(self, batch, hyper: dict) -> dict:
        """One training step on fixed tensors; the loss terms as floats."""
        kind = batch["masks"].device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.half):
            terms = self.losses(batch, hyper["temp"])
        self.optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        for name, module in self.student.items():
            norm = nn.utils.clip_grad_norm_(module.parameters(), CLIP)
            self.norms[name] = norm.item()
        for group, key in zip(self.optimizer.param_groups, self.groups, strict=True):
            rate, decayed, is_last = key
            group["lr"] = rate * hyper["last_layer_lr" if is_last else "lr"]
            group["weight_decay"] = decayed * hyper["wd"]
        self.optimizer.step()
        with torch.no_grad():
            teacher = list(self.teacher.parameters())
            torch._foreach_lerp_(
                teacher, list(self.student.parameters()), 1 - hyper["mom"]
            )
        return {name: value.item() for name, value in terms.items()}
