"""3-D convolutions whose workspace is bounded: MLX's own grows with the clip."""

from math import ceil

import mlx.core as mx

WORKSPACE = 1 << 29  # bytes of activations, and of filters, at a time


def workspace(
    size: tuple[int, int, int], dim_in: int, dim: int, taps: int = 3
) -> tuple[int, int]:
    """Bytes of activations and of filters that MLX holds for one float32 convolution
    with a kernel of (taps, 3, 3), whose output has the `size` (frames, rows, columns).

    The CPU unfolds the input. Metal convolves in 2-D once per tap and holds the work of
    all taps; where channels and frames are large, this is Winograd's F(6, 3): tiles of
    6x6 pixels become 8x8 (mlx/backend/metal/conv.cpp).
    """
    frames, height, width = size
    if mx.default_device().type == mx.cpu:
        return 4 * 9 * taps * frames * height * width * dim_in, 0
    outputs = 4 * (taps - 1) * frames * height * width * dim  # in addition to the sum
    aligned = dim_in % 32 == 0 == dim % 32
    if not aligned or dim_in + dim < 256 or frames * height * width < 4096:
        return outputs, 0
    rows, columns = ceil(height / 6), ceil(width / 6)
    padded = frames * (6 * rows + 2) * (6 * columns + 2) * dim_in
    transformed = 64 * frames * rows * columns * (dim_in + dim)
    filters = 4 * taps * 64 * dim_in * dim
    return outputs + 4 * taps * (padded + transformed), filters


def held(size: tuple[int, int, int], dim_in: int, dim: int, ahead: int) -> int:
    """Bytes that `conv3d` of one clip with 3 taps takes at its peak: workspace, padded
    input and two outputs, of `ahead` convolutions together, of one if in parts."""
    frames, height, width = size
    work, channels = workspace(size, dim_in, dim), 3 * (frames + 2) * dim_in
    ahead = 1 if max(work) > WORKSPACE else ahead
    work = sum(min(part, WORKSPACE) for part in work)
    return ahead * (work + 4 * height * width * (channels + 2 * frames * dim))


def conv3d(x: mx.array, weight: mx.array, padding: int) -> mx.array:
    """As `mx.conv3d`, up to rounding: `x` (B, F + taps - 1, H, W, C) with `weight`
    (O, taps, 3, 3, C) to (B, F, H', W', O), rows and columns zero-padded by `padding`.
    Clips are convolved one at a time, for which Metal is fast, and output channels, frames
    or rows in parts where the workspace would exceed WORKSPACE."""
    return mx.concatenate([_convolve(x, weight, padding) for x in mx.split(x, len(x))])


def _convolve(x: mx.array, weight: mx.array, padding: int) -> mx.array:
    dim, taps, _, _, dim_in = weight.shape
    frames = x.shape[1] - taps + 1
    height, width = (side - 2 + 2 * padding for side in x.shape[2:4])
    activations, filters = workspace((frames, height, width), dim_in, dim, taps)
    if max(activations, filters) <= WORKSPACE:
        return mx.conv3d(x, weight, padding=(0, padding, padding))
    if filters > WORKSPACE:
        axis, parts = 4, [(x, w) for w in mx.split(weight, 2)]
    elif frames > 1:
        axis, half = 1, frames // 2
        parts = [(x[:, : half + taps - 1], weight), (x[:, half:], weight)]
    else:
        axis, half = 2, height // 2
        x = mx.pad(x, [(0, 0), (0, 0), *[(padding, padding)] * 2, (0, 0)])
        padding = 0
        parts = [(x[:, :, : half + 2], weight), (x[:, :, half:], weight)]
    done = []
    for part in parts:
        done.append(_convolve(*part, padding))
        mx.eval(done[-1])  # else the workspaces of all parts are held
    return mx.concatenate(done, axis=axis)
