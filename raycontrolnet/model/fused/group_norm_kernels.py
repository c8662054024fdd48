"""Triton kernels of group normalization over channels-last images, with or without SiLU behind; `group_norm` runs them.

Each program works on ROWS pixels of one image times CHANNELS channels. Sums go over the pixels first, per channel, and
over a group's channels and the programs in a kernel of their own: nothing is added atomically, so that the same input
gives the same bits. All arithmetic is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channel_moments(x, sums, pixels, channels: tl.constexpr, summed: tl.constexpr, rows: tl.constexpr,
                    tile: tl.constexpr):  # fmt: skip
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
def _sums_over_parts(sums, image, channel, inside, parts: tl.constexpr, channels: tl.constexpr, at_once: tl.constexpr,
                     padded: tl.constexpr):  # fmt: skip
    """Add up both sums of some channels of an image over the parts of its pixels."""
    first = tl.zeros([padded], tl.float32)
    second = tl.zeros([padded], tl.float32)
    for start in range(0, parts, at_once):
        part = start + tl.arange(0, at_once)
        there = (part < parts)[:, None] & inside[None, :]
        place = sums + (image * parts + part[:, None]) * 2 * channels + channel[None, :]
        first += tl.sum(tl.load(place, mask=there, other=0.0), 0)
        second += tl.sum(tl.load(place + channels, mask=there, other=0.0), 0)
    return first, second


@triton.jit
def group_moments(x, sums, means, rstds, pixels, eps, parts: tl.constexpr, channels: tl.constexpr, size: tl.constexpr,
                  at_once: tl.constexpr, padded: tl.constexpr):  # fmt: skip
    """Combine a group's sums into its mean and reciprocal standard deviation (Chan et al. 1979)."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    within = tl.arange(0, padded)
    channel, inside = group * size + within, within < size
    total, squares = _sums_over_parts(sums, image, channel, inside, parts, channels, at_once, padded)
    pivot = tl.load(x + image * pixels * channels + channel, mask=inside, other=0.0).to(tl.float32)
    of_channel = pivot + total / pixels
    mean = tl.sum(tl.where(inside, of_channel, 0.0), 0) / size
    off = tl.where(inside, of_channel - mean, 0.0)
    variance = (tl.sum(squares - total * total / pixels, 0) + tl.sum(off * off, 0) * pixels) / (size * pixels)
    place = image * tl.num_programs(1) + group
    tl.store(means + place, mean)
    tl.store(rstds + place, 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps))


@triton.jit
def _tile(pixels, groups, channels: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr):
    """Return the tile of a program: its channels and which of them exist, their groups, its places and which exist."""
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * rows + tl.arange(0, rows)
    channel = tl.program_id(2) * tile + tl.arange(0, tile)
    inside = channel < channels
    place = image * pixels * channels + pixel[:, None] * channels + channel[None, :]
    return channel, inside, image * groups + channel // size, place, (pixel < pixels)[:, None] & inside[None, :]


@triton.jit
def _before_silu(slope, output):
    """Return the gradient of SiLU's input, `output` of the norm, by that of its output."""
    sigmoid = tl.sigmoid(output)
    return slope * sigmoid * (1.0 + output * (1.0 - sigmoid))


@triton.jit
def normalized(x, y, means, rstds, weight, bias, pixels, groups, channels: tl.constexpr, size: tl.constexpr,
               rows: tl.constexpr, tile: tl.constexpr, silu: tl.constexpr):  # fmt: skip
    channel, inside, of_group, place, there = _tile(pixels, groups, channels, size, rows, tile)
    mean = tl.load(means + of_group, mask=inside, other=0.0)
    rstd = tl.load(rstds + of_group, mask=inside, other=0.0)
    scale = rstd * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32) - mean * scale
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    output = value * scale[None, :] + shift[None, :]
    if silu:
        output *= tl.sigmoid(output)
    tl.store(y + place, output.to(y.dtype.element_ty), mask=there)


@triton.jit
def channel_gradients(x, dy, means, rstds, weight, bias, sums, pixels, groups, channels: tl.constexpr,
                      size: tl.constexpr, summed: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
                      silu: tl.constexpr):  # fmt: skip
    """Sum dy and dy times the normalized x over some pixels, of each channel."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * tile + tl.arange(0, tile)
    inside = channel < channels
    of_group = image * groups + channel // size
    mean = tl.load(means + of_group, mask=inside, other=0.0)
    rstd = tl.load(rstds + of_group, mask=inside, other=0.0)
    if silu:
        scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([rows, tile], tl.float32)
    products = tl.zeros([rows, tile], tl.float32)
    for start in range(0, summed, rows):
        pixel = part * summed + start + tl.arange(0, rows)
        there = (pixel < pixels)[:, None] & inside[None, :]
        place = image * pixels * channels + pixel[:, None] * channels + channel[None, :]
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        slope = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
        value = (value - mean[None, :]) * rstd[None, :]
        if silu:
            slope = _before_silu(slope, value * scale[None, :] + shift[None, :])
        total += slope
        products += slope * value
    place = sums + (image * tl.num_programs(1) + part) * 2 * channels + channel
    tl.store(place, tl.sum(total, 0), mask=inside)
    tl.store(place + channels, tl.sum(products, 0), mask=inside)


@triton.jit
def group_gradients(sums, weight, of_channels, of_groups, pixels, images, parts: tl.constexpr, channels: tl.constexpr,
                    size: tl.constexpr, at_once: tl.constexpr, padded: tl.constexpr):  # fmt: skip
    """Add up the sums of a group's channels, and their means over the group weighted by `weight`."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    within = tl.arange(0, padded)
    channel, inside = group * size + within, within < size
    total, products = _sums_over_parts(sums, image, channel, inside, parts, channels, at_once, padded)
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(of_channels + image * channels + channel, total, mask=inside)
    tl.store(of_channels + (images + image) * channels + channel, products, mask=inside)
    place, groups = image * tl.num_programs(1) + group, tl.num_programs(1)
    tl.store(of_groups + place, tl.sum(total * scale, 0) / (size * pixels))
    tl.store(of_groups + images * groups + place, tl.sum(products * scale, 0) / (size * pixels))


@triton.jit
def input_gradient(x, dy, dx, means, rstds, weight, bias, of_groups, pixels, groups, images, channels: tl.constexpr,
                   size: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr, silu: tl.constexpr):  # fmt: skip
    channel, inside, of_group, place, there = _tile(pixels, groups, channels, size, rows, tile)
    mean = tl.load(means + of_group, mask=inside, other=0.0)[None, :]
    rstd = tl.load(rstds + of_group, mask=inside, other=0.0)[None, :]
    along = tl.load(of_groups + of_group, mask=inside, other=0.0)[None, :]
    against = tl.load(of_groups + images * groups + of_group, mask=inside, other=0.0)[None, :]
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    slope = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
    value = (value - mean) * rstd
    if silu:
        shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        slope = _before_silu(slope, value * scale + shift)
    gradient = rstd * (scale * slope - along - value * against)
    tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=there)
