"""Triton kernels of group normalization over channels-last images, with or without SiLU behind; `group_norm` runs them.

Each program works on some pixels of one image times CHANNELS channels. Sums go over the pixels first, per channel, and
over a group's channels and the programs in a kernel of their own: nothing is added atomically, so that the same input
gives the same bits. All arithmetic is fp32.

The kernels that pass over images know no groups: all they need stands in `coefficients`, for each image and channel.
That takes fewer instructions (which bound them as much as memory does), and no size has to be a constant: Triton
compiles a kernel for a few dtypes, not for every layer's size, which is what the first run on a machine waits for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from raycontrolnet.model.fused.shared_kernels import before_silu


@triton.jit
def channel_moments(x, sums, pixels, channels, summed: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr):
    """Sum x and its square over some pixels, of each channel, less the channel's first pixel against cancellation."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * tile + tl.arange(0, tile)
    inside = channel < channels
    x += image * pixels * channels
    pivot = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([rows, tile], tl.float32)
    squares = tl.zeros([rows, tile], tl.float32)
    for start in range(0, summed, rows):
        pixel = part * summed + start + tl.arange(0, rows)
        there = (pixel < pixels)[:, None] & inside[None, :]
        value = tl.load(x + pixel[:, None] * channels + channel[None, :], mask=there, other=0.0).to(tl.float32)
        value = tl.where(there, value - pivot[None, :], 0.0)
        total += value
        squares += value * value
    place = sums + (image * tl.num_programs(1) + part) * 2 * channels + channel
    tl.store(place, tl.sum(total, 0), mask=inside)
    tl.store(place + channels, tl.sum(squares, 0), mask=inside)


@triton.jit
def _sums_over_parts(sums, image, channel, inside, parts, channels, steps: tl.constexpr, at_once: tl.constexpr,
                     padded: tl.constexpr):  # fmt: skip
    """Add up both sums of some channels of an image over the parts of its pixels."""
    first = tl.zeros([padded], tl.float32)
    second = tl.zeros([padded], tl.float32)
    for step in range(steps):
        part = step * at_once + tl.arange(0, at_once)
        there = (part < parts)[:, None] & inside[None, :]
        place = sums + (image * parts + part[:, None]) * 2 * channels + channel[None, :]
        first += tl.sum(tl.load(place, mask=there, other=0.0), 0)
        second += tl.sum(tl.load(place + channels, mask=there, other=0.0), 0)
    return first, second


@triton.jit(do_not_specialize=["parts", "size", "moved"])
def group_moments(x, sums, weight, bias, moves, coefficients, pixels, eps, parts, channels, size, moved,
                  steps: tl.constexpr, at_once: tl.constexpr, padded: tl.constexpr):  # fmt: skip
    """Combine a group's sums into its mean and reciprocal standard deviation (Chan et al. 1979), for its channels.

    What is to be added to a channel, `moves` if `moved` is not 0, changes means alone: no pass over the image adds it.
    """
    image, within = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    channel, inside = tl.program_id(1) * size + within, within < size
    total, squares = _sums_over_parts(sums, image, channel, inside, parts, channels, steps, at_once, padded)
    pivot = tl.load(x + image * pixels * channels + channel, mask=inside, other=0.0).to(tl.float32)
    move = tl.load(moves + image * channels + channel, mask=inside & (moved != 0), other=0.0).to(tl.float32)
    of_channel = pivot + total / pixels + move
    mean = tl.sum(tl.where(inside, of_channel, 0.0), 0) / size
    off = tl.where(inside, of_channel - mean, 0.0)
    variance = (tl.sum(squares - total * total / pixels, 0) + tl.sum(off * off, 0) * pixels) / (size * pixels)
    rstd = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    scale = rstd * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32) - (mean - move) * scale
    place = coefficients + image * 4 * channels + channel
    tl.store(place, scale, mask=inside)
    tl.store(place + channels, shift, mask=inside)
    tl.store(place + 2 * channels, mean - move, mask=inside)
    tl.store(place + 3 * channels, tl.zeros_like(scale) + rstd, mask=inside)


@triton.jit
def _tile(pixels, channels, rows: tl.constexpr, tile: tl.constexpr):
    """Return the tile of a program: its image, channels and which of them exist, its places and which exist."""
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * rows + tl.arange(0, rows)
    channel = tl.program_id(2) * tile + tl.arange(0, tile)
    inside = channel < channels
    place = image * pixels * channels + pixel[:, None] * channels + channel[None, :]
    return image, channel, inside, place, (pixel < pixels)[:, None] & inside[None, :]


@triton.jit
def normalized(x, y, coefficients, pixels, channels, rows: tl.constexpr, tile: tl.constexpr, silu: tl.constexpr):
    image, channel, inside, place, there = _tile(pixels, channels, rows, tile)
    coefficients += image * 4 * channels + channel
    scale = tl.load(coefficients, mask=inside, other=0.0)
    shift = tl.load(coefficients + channels, mask=inside, other=0.0)
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    output = value * scale[None, :] + shift[None, :]
    if silu:
        output *= tl.sigmoid(output)
    tl.store(y + place, output.to(y.dtype.element_ty), mask=there)


@triton.jit
def channel_gradients(x, dy, coefficients, sums, pixels, channels, summed: tl.constexpr, rows: tl.constexpr,
                      tile: tl.constexpr, silu: tl.constexpr):  # fmt: skip
    """Sum dy and dy times x less its mean over some pixels, of each channel."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * tile + tl.arange(0, tile)
    inside = channel < channels
    coefficients += image * 4 * channels + channel
    mean = tl.load(coefficients + 2 * channels, mask=inside, other=0.0)
    if silu:
        scale = tl.load(coefficients, mask=inside, other=0.0)
        shift = tl.load(coefficients + channels, mask=inside, other=0.0)
    total = tl.zeros([rows, tile], tl.float32)
    products = tl.zeros([rows, tile], tl.float32)
    for start in range(0, summed, rows):
        pixel = part * summed + start + tl.arange(0, rows)
        there = (pixel < pixels)[:, None] & inside[None, :]
        place = image * pixels * channels + pixel[:, None] * channels + channel[None, :]
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        slope = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
        if silu:
            slope = before_silu(slope, value * scale[None, :] + shift[None, :])
        total += slope
        products += slope * (value - mean[None, :])
    place = sums + (image * tl.num_programs(1) + part) * 2 * channels + channel
    tl.store(place, tl.sum(total, 0), mask=inside)
    tl.store(place + channels, tl.sum(products, 0), mask=inside)


@triton.jit(do_not_specialize=["parts", "size"])
def group_gradients(sums, coefficients, of_channels, corrections, pixels, parts, channels, size, steps: tl.constexpr,
                    at_once: tl.constexpr, padded: tl.constexpr):  # fmt: skip
    """Add up a group's sums: the gradients of bias and weight, and the corrections of dx, a factor of x and a rest."""
    image, within = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    channel, inside = tl.program_id(1) * size + within, within < size
    total, products = _sums_over_parts(sums, image, channel, inside, parts, channels, steps, at_once, padded)
    coefficients += image * 4 * channels + channel
    scale = tl.load(coefficients, mask=inside, other=0.0)
    mean = tl.load(coefficients + 2 * channels, mask=inside, other=0.0)
    rstd = tl.load(coefficients + 3 * channels, mask=inside, other=0.0)
    products *= rstd
    place = image * 2 * channels + channel
    tl.store(of_channels + place, total, mask=inside)
    tl.store(of_channels + place + channels, products, mask=inside)
    along = tl.sum(total * scale, 0) / (size * pixels)
    against = tl.sum(products * scale, 0) / (size * pixels) * rstd
    tl.store(corrections + place, -against, mask=inside)
    tl.store(corrections + place + channels, mean * against - along, mask=inside)


@triton.jit
def input_gradient(x, dy, rest, dx, coefficients, corrections, pixels, channels, rows: tl.constexpr,
                   tile: tl.constexpr, silu: tl.constexpr, with_rest: tl.constexpr):  # fmt: skip
    image, channel, inside, place, there = _tile(pixels, channels, rows, tile)
    coefficients += image * 4 * channels + channel
    corrections += image * 2 * channels + channel
    scale = tl.load(coefficients, mask=inside, other=0.0)[None, :]
    factor = tl.load(corrections, mask=inside, other=0.0)[None, :]
    constant = tl.load(corrections + channels, mask=inside, other=0.0)[None, :]
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    slope = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
    if silu:
        slope = before_silu(slope, value * scale + tl.load(coefficients + channels, mask=inside, other=0.0)[None, :])
    gradient = slope * scale + (value * factor + constant)
    if with_rest:
        gradient += tl.load(rest + place, mask=there, other=0.0).to(tl.float32)
    tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=there)
