"""EDM's preconditioning (Karras et al. 2022, Table 1) and its eps-shifted form."""

import torch
from torch import Tensor, nn

from fastgan.models.unets import UNet

D2O_EPS = 0.002
SIGMA_INIT = 80.0  # G(z) = D(80 z; 80)


class Precond(nn.Module):
    """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), with D(x; eps) = x.

    eps = 0 is EDM's; eps = 0.002 (D2O's) makes the network an identity at the smallest sigma. The
    arithmetic outside the UNet keeps x's dtype (float32 at least), the UNet computes in
    `compute_dtype` (None: its parameters'). Parameters carry the published names, `model.enc...`.
    """

    def __init__(
        self,
        model: UNet,
        *,
        label_dim: int,
        eps: float,
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        sigma_max: float = float("inf"),
    ) -> None:
        super().__init__()
        self.model = model
        self.label_dim = label_dim
        self.eps, self.sigma_data = eps, sigma_data
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.compute_dtype: torch.dtype | None = None

    def c_skip(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / ((sigma - self.eps) ** 2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        return (sigma - self.eps) * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def c_in(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + self.sigma_data**2).sqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        return sigma.log() / 4

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Denoises x [N, C, H, W] at sigma [N] or [1]; labels one-hot [N, label_dim] or None."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sigma = sigma.to(x.dtype).reshape(-1, 1, 1, 1)
        scaled = self._for_unet(self.c_in(sigma) * x)
        # Not len(x), which torch.export takes for a constant.
        noise = self._noise_label(sigma, x.shape[0])
        raw = self.model(scaled, noise, self._labels(class_labels), augment_labels)
        return self.c_skip(sigma) * x + self.c_out(sigma) * raw.to(x.dtype)

    def features(self, x: Tensor, sigma: float, class_labels: Tensor | None = None) -> list[Tensor]:
        """The encoder's last map at every resolution, shallow to deep, for x at noise level sigma.

        Makes a frozen denoiser a feature network; x is [N, C, H, W] in [-1, 1] without noise added.
        """
        level = torch.full((len(x), 1, 1, 1), sigma, dtype=x.dtype, device=x.device)
        emb = self.model.embed(self._noise_label(level, len(x)), self._labels(class_labels))
        _, skips = self.model.encode(self._for_unet(self.c_in(level) * x), emb)
        return list({skip.shape[-1]: skip for skip in skips}.values())

    def _for_unet(self, x: Tensor) -> Tensor:
        # What follows keeps the layout: on a GPU every convolution and kernel wants channels_last.
        layout = torch.channels_last if x.is_cuda else torch.preserve_format
        dtype = self.compute_dtype or next(self.model.parameters()).dtype
        return x.to(dtype, memory_format=layout)

    def _noise_label(self, sigma: Tensor, n: int) -> Tensor:
        # The embedding and the affine maps stay in the parameters' dtype at any compute_dtype.
        masters = next(self.model.parameters()).dtype
        return self.c_noise(sigma).flatten().expand(n).to(masters)

    def _labels(self, labels: Tensor | None) -> Tensor | None:
        """Labels in the parameters' dtype; a conditional network reads missing ones as zeros."""
        masters = next(self.model.parameters())
        if not self.label_dim:
            return None
        if labels is None:
            return masters.new_zeros(1, self.label_dim)
        return labels.to(masters.dtype)
