"""Device code of the norm's kernels: one program, forward and backward."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def norm_forward(
    x_ptr, beside_ptr, bias_ptr, before_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr,
    pixels, channels, first_channels, groups, x_stride, beside_stride, affine_stride, eps,
    has_bias: tl.constexpr, has_before: tl.constexpr, silu: tl.constexpr, picks: tl.constexpr, mixes: tl.constexpr,
    whole: tl.constexpr, full: tl.constexpr, group_size: tl.constexpr, groups_each: tl.constexpr, width: tl.constexpr,
    height: tl.constexpr, group_width: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, width)
    start = tl.program_id(0) * groups_each * group_size
    channel = start + local
    valid = (local < groups_each * group_size) & (channel < channels)
    local_group = tl.arange(0, group_width)
    member = (local // group_size)[:, None] == local_group[None, :]  # [width, group_width]
    if picks:
        x_ptr, x_stride = _pick(x_ptr, x_stride, beside_ptr, beside_stride, start, first_channels)
    x_ptr += image * pixels * x_stride
    if mixes:
        beside_ptr += image * pixels * beside_stride
    y_ptr += image * pixels * channels

    held, first, total, squares = _channel_sums(
        x_ptr, x_stride, beside_ptr, beside_stride, pixels, channel, first_channels, valid, mixes, whole, full, height
    )
    added = _added(bias_ptr, before_ptr, image, channel, channels, valid, has_bias, has_before)
    channel_mean = first + total / pixels + added
    spread = squares - total * total / pixels
    group_mean = tl.sum(tl.where(member & valid[:, None], channel_mean[:, None], 0.0), 0) / group_size
    mean = tl.sum(tl.where(member, group_mean[None, :], 0.0), 1)
    spread += pixels * (channel_mean - mean) * (channel_mean - mean)
    group_var = tl.sum(tl.where(member & valid[:, None], spread[:, None], 0.0), 0) / (pixels * group_size)
    group_rstd = 1.0 / tl.sqrt(group_var + eps)
    rstd = tl.sum(tl.where(member, group_rstd[None, :], 0.0), 1)
    group = tl.program_id(0) * groups_each + local_group
    kept = (local_group < groups_each) & (group < groups)
    tl.store(mean_ptr + image * groups + group, group_mean, mask=kept)
    tl.store(rstd_ptr + image * groups + group, group_rstd, mask=kept)

    scale = tl.load(scale_ptr + image * affine_stride + channel, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + image * affine_stride + channel, mask=valid, other=0.0).to(tl.float32)
    factor = rstd * scale
    offset = shift - (mean - added) * factor
    pixel = tl.arange(0, height)
    if whole:
        mask = _mask(pixel, pixels, valid, full)
        _store_act(held, factor, offset, y_ptr, pixel, channel, channels, mask, silu)
    else:
        for past in range(0, pixels, height):
            mask = _mask(past + pixel, pixels, valid, full)
            x = load_pixels(
                x_ptr, x_stride, beside_ptr, beside_stride, past + pixel, channel, first_channels, mask, mixes
            )
            _store_act(x, factor, offset, y_ptr, past + pixel, channel, channels, mask, silu)


@triton.jit
def _channel_sums(
    x_ptr, x_stride, beside_ptr, beside_stride, pixels, channel, first_channels, valid,
    mixes: tl.constexpr, whole: tl.constexpr, full: tl.constexpr, height: tl.constexpr,
):  # fmt: skip
    """Return an image's first tile, its first pixel, and the sums of all differences to that pixel and their squares.

    The shift by a pixel keeps the variance accurate for a mean far from zero.
    """
    one = tl.arange(0, 1)
    first = load_pixels(x_ptr, x_stride, beside_ptr, beside_stride, one, channel, first_channels, valid[None, :], mixes)
    first = tl.sum(first.to(tl.float32), 0)
    pixel = tl.arange(0, height)
    mask = _mask(pixel, pixels, valid, full)
    held = load_pixels(x_ptr, x_stride, beside_ptr, beside_stride, pixel, channel, first_channels, mask, mixes)
    x = tl.where(mask, held.to(tl.float32) - first[None, :], 0.0)
    total = tl.sum(x, 0)
    squares = tl.sum(x * x, 0)
    if not whole:
        for past in range(height, pixels, height):
            mask = _mask(past + pixel, pixels, valid, full)
            x = load_pixels(
                x_ptr, x_stride, beside_ptr, beside_stride, past + pixel, channel, first_channels, mask, mixes
            )
            x = tl.where(mask, x.to(tl.float32) - first[None, :], 0.0)
            total += tl.sum(x, 0)
            squares += tl.sum(x * x, 0)
    return held, first, total, squares


@triton.jit
def _mask(pixel, pixels, valid, full: tl.constexpr):
    """Return the mask of valid [pixels, channels] of a tile; a full tile skips the comparison."""
    mask = (pixel < pixels)[:, None] & valid[None, :]
    if full:
        mask = tl.full(mask.shape, True, tl.int1)
    return mask


@triton.jit
def sigmoid(z):
    return libdevice.fast_dividef(1.0, 1.0 + tl.exp(-z))  # within 2 ulp; the exact division is a tenth of a norm's time


@triton.jit
def _added(bias_ptr, before_ptr, image, channel, channels, valid, has_bias: tl.constexpr, has_before: tl.constexpr):
    """Return the per-channel sum that is added to every pixel of an image before its norm."""
    added = tl.where(valid, 0.0, 0.0)
    if has_bias:
        added += tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    if has_before:
        added += tl.load(before_ptr + image * channels + channel, mask=valid, other=0.0).to(tl.float32)
    return added


@triton.jit
def _pick(x_ptr, x_stride, beside_ptr, beside_stride, start, first_channels):
    """Return the location of a program's channels, all in x or all in beside."""
    is_beside = start >= first_channels
    return tl.where(is_beside, beside_ptr - first_channels, x_ptr), tl.where(is_beside, beside_stride, x_stride)


@triton.jit
def load_pixels(
    x_ptr, x_stride, beside_ptr, beside_stride, pixel, channel, first_channels, mask, mixes: tl.constexpr
):  # fmt: skip
    """Load [pixels, channels] of one image; if a program `mixes`, those from `first_channels` on come from beside."""
    own = mask
    if mixes:
        own = mask & (channel < first_channels)[None, :]
    x = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=own, other=0.0)
    if mixes:
        place = beside_ptr + pixel[:, None] * beside_stride + (channel - first_channels)[None, :]
        x = tl.where(own, x, tl.load(place, mask=mask & (channel >= first_channels)[None, :], other=0.0))
    return x


@triton.jit
def _store_act(x, factor, offset, y_ptr, pixel, channel, channels, mask, silu: tl.constexpr):
    y = x.to(tl.float32) * factor[None, :] + offset[None, :]
    if silu:
        y = y * sigmoid(y)
    tl.store(y_ptr + pixel[:, None] * channels + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward(
    x_ptr, beside_ptr, bias_ptr, before_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, dy_ptr, passed_ptr,
    passed_beside_ptr, dx_ptr, d_beside_ptr, d_before_ptr, d_scale_ptr, d_shift_ptr,
    pixels, channels, first_channels, groups, x_stride, beside_stride, dy_stride, passed_stride, passed_beside_stride,
    affine_stride,
    has_bias: tl.constexpr, has_before: tl.constexpr, passes: tl.constexpr, tangent: tl.constexpr, silu: tl.constexpr,
    picks: tl.constexpr, mixes: tl.constexpr, whole: tl.constexpr, full: tl.constexpr, group_size: tl.constexpr,
    groups_each: tl.constexpr, width: tl.constexpr, height: tl.constexpr, group_width: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x from that of y; or, as a `tangent`, the derivative of y from that of x.

    A norm's Jacobian is a diagonal matrix, act'(z) scale, times a symmetric one: the two differ in their order alone.
    """
    image = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, width)
    start = tl.program_id(0) * groups_each * group_size
    channel = start + local
    valid = (local < groups_each * group_size) & (channel < channels)
    member = (local // group_size)[:, None] == tl.arange(0, group_width)[None, :]  # [width, group_width]
    dx_stride, d_beside_stride = first_channels, channels - first_channels
    if picks:
        x_ptr, x_stride = _pick(x_ptr, x_stride, beside_ptr, beside_stride, start, first_channels)
        dx_ptr, dx_stride = _pick(dx_ptr, dx_stride, d_beside_ptr, d_beside_stride, start, first_channels)
        if passes:
            passed_ptr, passed_stride = _pick(
                passed_ptr, passed_stride, passed_beside_ptr, passed_beside_stride, start, first_channels
            )
    first = image * pixels
    x_ptr += first * x_stride
    dy_ptr += first * dy_stride
    if mixes:
        beside_ptr += first * beside_stride
    mean = tl.load(mean_ptr + image * groups + channel // group_size, mask=valid, other=0.0)
    rstd = tl.load(rstd_ptr + image * groups + channel // group_size, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + image * affine_stride + channel, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + image * affine_stride + channel, mask=valid, other=0.0).to(tl.float32)
    mean -= _added(bias_ptr, before_ptr, image, channel, channels, valid, has_bias, has_before)

    x, dy, sum_dz, sum_dz_normed, sum_normed = _gradient_sums(
        x_ptr, x_stride, beside_ptr, beside_stride, dy_ptr, dy_stride, pixels, channel, first_channels, valid, mean,
        rstd, scale, shift, mixes, silu and not tangent, whole, full, height,
    )  # fmt: skip
    factor = scale  # of dz within the symmetric matrix
    if tangent:
        factor = tl.where(valid, 1.0, 0.0)
    else:
        tl.store(d_shift_ptr + image * channels + channel, sum_dz, mask=valid)
        tl.store(d_scale_ptr + image * channels + channel, sum_dz_normed, mask=valid)

    mean_dz = _group_mean(factor * sum_dz, member, pixels * group_size)
    mean_dz_normed = _group_mean(factor * sum_dz_normed, member, pixels * group_size)
    if has_bias or has_before:
        d_before = rstd * (scale * sum_dz - pixels * mean_dz - sum_normed * mean_dz_normed)
        tl.store(d_before_ptr + image * channels + channel, d_before, mask=valid)
    _store_dx(
        x, dy, x_ptr, x_stride, beside_ptr, beside_stride, dy_ptr, dy_stride, passed_ptr, passed_stride,
        passed_beside_ptr, passed_beside_stride, dx_ptr, dx_stride, d_beside_ptr, d_beside_stride, first, pixels,
        channel, first_channels, valid, mean, rstd, scale, shift, factor, mean_dz, mean_dz_normed,
        passes, tangent, silu, mixes, whole, full, height,
    )  # fmt: skip


@triton.jit
def _group_mean(values, member, count):
    """Return for each channel the sum of `values` over its group, over `count`; [width], member [width, groups]."""
    means = tl.sum(tl.where(member, values[:, None], 0.0), 0) / count
    return tl.sum(tl.where(member, means[None, :], 0.0), 1)


@triton.jit
def _store_dx(
    x, dy, x_ptr, x_stride, beside_ptr, beside_stride, dy_ptr, dy_stride, passed_ptr, passed_stride,
    passed_beside_ptr, passed_beside_stride, dx_ptr, dx_stride, d_beside_ptr, d_beside_stride, first, pixels,
    channel, first_channels, valid, mean, rstd, scale, shift, factor, mean_dz, mean_dz_normed,
    passes: tl.constexpr, tangent: tl.constexpr, silu: tl.constexpr, mixes: tl.constexpr, whole: tl.constexpr,
    full: tl.constexpr, height: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, a tile of pixels at a time, added to the gradient of the x passed on.

    `first` is the image's first pixel among all; x, beside and dy begin at it already.
    """
    dx_ptr += first * dx_stride
    if mixes:
        d_beside_ptr += first * d_beside_stride
    if passes:
        passed_ptr += first * passed_stride
        if mixes:
            passed_beside_ptr += first * passed_beside_stride
    pixel = tl.arange(0, height)
    for past in range(0, height if whole else pixels, height):
        mask = _mask(past + pixel, pixels, valid, full)
        if not whole:
            x = load_pixels(
                x_ptr, x_stride, beside_ptr, beside_stride, past + pixel, channel, first_channels, mask, mixes
            )
            dy = tl.load(dy_ptr + (past + pixel)[:, None] * dy_stride + channel[None, :], mask=mask, other=0.0)
        # Recomputed for a whole image: holding the tiles costs more.
        normed, dz = _normed_and_dz(x, dy, mask, mean, rstd, scale, shift, silu and not tangent)
        dx = rstd[None, :] * (factor[None, :] * dz - mean_dz[None, :] - normed * mean_dz_normed[None, :])
        if tangent:
            dx *= scale[None, :]
            if silu:
                dx *= silu_slope(normed * scale[None, :] + shift[None, :])
        if passes:
            dx += load_pixels(
                passed_ptr, passed_stride, passed_beside_ptr, passed_beside_stride, past + pixel, channel,
                first_channels, mask, mixes,
            ).to(tl.float32)  # fmt: skip
        store_pixels(
            dx, dx_ptr, dx_stride, d_beside_ptr, d_beside_stride, past + pixel, channel, first_channels, mask, mixes
        )


@triton.jit
def _gradient_sums(
    x_ptr, x_stride, beside_ptr, beside_stride, dy_ptr, dy_stride, pixels, channel, first_channels, valid, mean, rstd,
    scale, shift,
    mixes: tl.constexpr, silu: tl.constexpr, whole: tl.constexpr, full: tl.constexpr, height: tl.constexpr,
):  # fmt: skip
    """Return the first tiles of x and dy, and the sums over an image's pixels of dz, dz * normed and normed.

    Here z = normed * scale + shift and y = act(z).
    """
    pixel = tl.arange(0, height)
    mask = _mask(pixel, pixels, valid, full)
    held_x = load_pixels(x_ptr, x_stride, beside_ptr, beside_stride, pixel, channel, first_channels, mask, mixes)
    held_dy = tl.load(dy_ptr + pixel[:, None] * dy_stride + channel[None, :], mask=mask, other=0.0)
    normed, dz = _normed_and_dz(held_x, held_dy, mask, mean, rstd, scale, shift, silu)
    sum_dz, sum_dz_normed, sum_normed = tl.sum(dz, 0), tl.sum(dz * normed, 0), tl.sum(normed, 0)
    if not whole:
        for past in range(height, pixels, height):
            mask = _mask(past + pixel, pixels, valid, full)
            x = load_pixels(
                x_ptr, x_stride, beside_ptr, beside_stride, past + pixel, channel, first_channels, mask, mixes
            )
            dy = tl.load(dy_ptr + (past + pixel)[:, None] * dy_stride + channel[None, :], mask=mask, other=0.0)
            normed, dz = _normed_and_dz(x, dy, mask, mean, rstd, scale, shift, silu)
            sum_dz += tl.sum(dz, 0)
            sum_dz_normed += tl.sum(dz * normed, 0)
            sum_normed += tl.sum(normed, 0)
    return held_x, held_dy, sum_dz, sum_dz_normed, sum_normed


@triton.jit
def _normed_and_dz(x, dy, mask, mean, rstd, scale, shift, silu: tl.constexpr):
    dz = dy.to(tl.float32)
    normed = tl.where(mask, (x.to(tl.float32) - mean[None, :]) * rstd[None, :], 0.0)
    if silu:
        dz *= silu_slope(normed * scale[None, :] + shift[None, :])
    return normed, dz


@triton.jit
def silu_slope(z):
    gate = sigmoid(z)
    return gate * (1 + z * (1 - gate))


@triton.jit
def store_pixels(
    dx, dx_ptr, dx_stride, d_beside_ptr, d_beside_stride, pixel, channel, first_channels, mask, mixes: tl.constexpr
):  # fmt: skip
    """Store [pixels, channels] of one image at the places that `load_pixels` reads."""
    dx = dx.to(dx_ptr.dtype.element_ty)
    own = mask
    if mixes:
        own = mask & (channel < first_channels)[None, :]
    tl.store(dx_ptr + pixel[:, None] * dx_stride + channel[None, :], dx, mask=own)
    if mixes:
        place = d_beside_ptr + pixel[:, None] * d_beside_stride + (channel - first_channels)[None, :]
        tl.store(place, dx, mask=mask & (channel >= first_channels)[None, :])
