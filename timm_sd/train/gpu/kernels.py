"""Triton kernels for training the CIFAR ResNets: 3x3 convolution, batch normalization and SGD.

Images and activations have their channels innermost, and one of two layouts:

    bordered    (B, H + 2, W + 2, C), within a border of zeros that nothing ever writes
    flat        (B * H * W, C)

What a convolution reads is bordered, so it needs no masks: the three pixels under a row of its filter are neighbors in
memory. A row is one matrix product, over a window of four pixels since sizes are powers of two; the weights of the
fourth are zero. Behind the last pixel of a bordered tensor there must be room for one more.

A sum over all pixels leaves a kernel as one row of partial sums for each of its programs, and whoever needs the sum
adds the rows in order. There are no atomics, so the same inputs give the same bits.

A program computes PIXELS * TILES output pixels, and all programs together exactly B * H * W; only in `weight_gradient`
the last one may have fewer.
"""

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-5)  # of batch normalization, as in nn.BatchNorm2d
BN_MOMENTUM = tl.constexpr(0.1)
ROWS = tl.constexpr(32)  # of partial sums, added at a time
GRADIENTS = tl.constexpr(16)  # partial ones, added at a time
MOMENTUM = tl.constexpr(0.9)  # of SGD


@triton.jit
def place(pixel, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """The index in a bordered tensor of the pixel (STRIDE y, STRIDE x) that output pixel (y, x) of an image lies on."""
    image = pixel // (SIZE * SIZE)
    y = pixel // SIZE % SIZE
    x = pixel % SIZE
    width: tl.constexpr = STRIDE * SIZE + 2
    return (image * width + STRIDE * y + 1) * width + STRIDE * x + 1


@triton.jit
def convolved(
    x_ptr,  # bordered, (B, STRIDE * H, STRIDE * W, IN)
    w_ptr,  # (OUT, 3, 3, IN); TRANSPOSED: (IN, 3, 3, OUT)
    pixel,  # (PIXELS,), of B images of H x W pixels
    SIZE: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The convolution of x at some pixels, (PIXELS, OUT) in float32, or TRANSPOSED as for the gradient of an input."""
    width: tl.constexpr = STRIDE * SIZE + 2
    out = tl.arange(0, OUT)
    k = tl.arange(0, 4 * IN)  # a window of four pixels
    window = x_ptr + ((place(pixel, SIZE, STRIDE) - width - 1) * IN)[:, None] + k[None, :]
    used = (k < 3 * IN)[:, None]
    if TRANSPOSED:  # the filter turned by 180 degrees
        row = w_ptr + (k % IN * (9 * OUT) + (8 - k // IN) * OUT)[:, None] + out[None, :]
        step: tl.constexpr = -3 * OUT
    else:
        row = w_ptr + (out * (9 * IN))[None, :] + k[:, None]
        step: tl.constexpr = 3 * IN
    if AT_ONCE:  # all loads of x come before the products, so that their latencies overlap
        x0 = tl.load(window)
        x1 = tl.load(window + width * IN)
        x2 = tl.load(window + 2 * width * IN)
        y = tl.dot(x0, tl.load(row, mask=used, other=0.0))
        y = tl.dot(x1, tl.load(row + step, mask=used, other=0.0), y)
        y = tl.dot(x2, tl.load(row + 2 * step, mask=used, other=0.0), y)
    else:  # in float32, three windows at once take too many registers
        y = tl.zeros([pixel.shape[0], OUT], tl.float32)
        for _ in range(3):
            y = tl.dot(tl.load(window), tl.load(row, mask=used, other=0.0), y)
            window += width * IN
            row += step
    return y


@triton.jit
def added(partial_ptr, rows, channel, C: tl.constexpr, MOST_ROWS: tl.constexpr):
    """The two sums of each channel, from `rows` rows (2, C) of partial sums."""
    first = tl.zeros([ROWS, C], tl.float32)
    second = tl.zeros([ROWS, C], tl.float32)
    for start in range(0, MOST_ROWS, ROWS):  # not `rows`, which the interpreter of Triton 3.6 refuses with NumPy 2.4
        row = start + tl.arange(0, ROWS)
        at = partial_ptr + (row * (2 * C))[:, None] + channel[None, :]
        first += tl.load(at, mask=(row < rows)[:, None], other=0.0)
        second += tl.load(at + C, mask=(row < rows)[:, None], other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def pooled(x_ptr, pixel, channel, SIZE: tl.constexpr, IN: tl.constexpr):
    """Option A's shortcut to H x W pixels: x, bordered with IN channels, averaged over 2x2 pixels; then zeros."""
    at = x_ptr + (place(pixel, SIZE, 2) * IN)[:, None] + channel[None, :]
    below = (2 * SIZE + 2) * IN
    exists = (channel < IN)[None, :]
    x = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    x += tl.load(at + IN, mask=exists, other=0.0).to(tl.float32)
    x += tl.load(at + below, mask=exists, other=0.0).to(tl.float32)
    x += tl.load(at + below + IN, mask=exists, other=0.0).to(tl.float32)
    return (x * 0.25).to(x_ptr.dtype.element_ty).to(tl.float32)  # rounded, as a tensor of its own would be


@triton.jit
def convolve(
    x_ptr,  # bordered, (B, STRIDE * H, STRIDE * W, IN)
    w_ptr,  # (OUT, 3, 3, IN)
    y_ptr,  # flat, (B * H * W, OUT)
    partial_ptr,  # a row (2, OUT) for each program
    SIZE: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """y, and partial sums of y and of its square."""
    out = tl.arange(0, OUT)
    total = tl.zeros([OUT], tl.float32)
    squares = tl.zeros([OUT], tl.float32)
    for tile in range(TILES):
        pixel = (tl.program_id(0) * TILES + tile) * PIXELS + tl.arange(0, PIXELS)
        y = convolved(x_ptr, w_ptr, pixel, SIZE, IN, OUT, STRIDE, False, True).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (pixel * OUT)[:, None] + out[None, :], y)
        y = y.to(tl.float32)
        total += tl.sum(y, 0)
        squares += tl.sum(y * y, 0)
    at = partial_ptr + tl.program_id(0) * (2 * OUT) + out
    tl.store(at, total)
    tl.store(at + OUT, squares)


@triton.jit
def normalize(
    y_ptr,  # flat, (B * H * W, C): the convolution's output
    out_ptr,  # bordered, (B, H, W, C)
    x_ptr,  # the shortcut's input, bordered: (B, H, W, C) with SHORTCUT 1, (B, 2 H, 2 W, POOLED) with SHORTCUT 2
    partial_ptr,  # of `convolve`
    rows,  # of them
    affine_ptr,  # (2, C): scale and shift
    moments_ptr,  # (2, C): mean and 1 / standard deviation, for the backward pass
    running_ptr,  # (2, C): running mean and variance
    pixels,  # B * H * W
    SIZE: tl.constexpr,
    C: tl.constexpr,
    SHORTCUT: tl.constexpr,
    POOLED: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """out = ReLU(bn(y)), plus the shortcut before the ReLU: 0 for none, 1 for identity, 2 for option A."""
    c = tl.arange(0, C)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y = tl.load(y_ptr + (pixel * C)[:, None] + c[None, :]).to(tl.float32)
    inside = (place(pixel, SIZE, 1) * C)[:, None] + c[None, :]

    total, squares = added(partial_ptr, rows, c, C, MOST_ROWS)
    count = pixels.to(tl.float32)
    mean = total / count
    variance = tl.maximum(squares / count - mean * mean, 0.0)
    inverse = 1 / tl.sqrt(variance + EPSILON)
    if tl.program_id(0) == 0:
        tl.store(moments_ptr + c, mean)
        tl.store(moments_ptr + C + c, inverse)
        running = running_ptr + c
        before = tl.load(running)
        tl.store(running, before + BN_MOMENTUM * (mean - before))
        before = tl.load(running + C)
        tl.store(running + C, before + BN_MOMENTUM * (variance * (count / (count - 1)) - before))

    scale = tl.load(affine_ptr + c) * inverse
    y = (y - mean[None, :]) * scale[None, :] + tl.load(affine_ptr + C + c)[None, :]
    if SHORTCUT == 1:
        y += tl.load(x_ptr + inside).to(tl.float32)
    if SHORTCUT == 2:
        y += pooled(x_ptr, pixel, c, SIZE, POOLED)
    tl.store(out_ptr + inside, tl.maximum(y, 0.0).to(out_ptr.dtype.element_ty))


@triton.jit
def sum_gradient(
    g_ptr,  # flat, (B * H * W, C): the gradient with respect to out
    out_ptr,  # bordered, (B, H, W, C): ReLU's output
    y_ptr,  # flat, (B * H * W, C): batch normalization's input
    moments_ptr,  # (2, C)
    partial_ptr,  # a row (2, C) for each program
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Partial sums of the gradient before the ReLU, and of its product with y - mean."""
    c = tl.arange(0, C)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    own = (pixel * C)[:, None] + c[None, :]
    out = tl.load(out_ptr + (place(pixel, SIZE, 1) * C)[:, None] + c[None, :])
    g = tl.where(out > 0, tl.load(g_ptr + own).to(tl.float32), 0.0)
    deviation = tl.load(y_ptr + own).to(tl.float32) - tl.load(moments_ptr + c)[None, :]
    at = partial_ptr + tl.program_id(0) * (2 * C) + c
    tl.store(at, tl.sum(g, 0))
    tl.store(at + C, tl.sum(g * deviation, 0))


@triton.jit
def normalize_backward(
    g_ptr,  # flat, (B * H * W, C): the gradient with respect to the ReLU's output, or with RELU false to its input
    out_ptr,  # bordered, (B, H, W, C): the ReLU's output
    y_ptr,  # flat, (B * H * W, C): batch normalization's input
    dy_ptr,  # bordered, (B, STRIDE * H, STRIDE * W, C)
    affine_ptr,  # (2, C)
    moments_ptr,  # (2, C)
    partial_ptr,  # of the gradient: rows (2, C)
    rows,
    daffine_ptr,  # (2, C): the gradients of scale and shift
    pixels,  # B * H * W
    SIZE: tl.constexpr,
    C: tl.constexpr,
    RELU: tl.constexpr,
    STRIDE: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The gradient with respect to y; with STRIDE 2 spread out over every second pixel of every second row."""
    c = tl.arange(0, C)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    own = (pixel * C)[:, None] + c[None, :]
    g = tl.load(g_ptr + own).to(tl.float32)
    y = tl.load(y_ptr + own).to(tl.float32)
    if RELU:
        g = tl.where(tl.load(out_ptr + (place(pixel, SIZE, 1) * C)[:, None] + c[None, :]) > 0, g, 0.0)

    dshift, product = added(partial_ptr, rows, c, C, MOST_ROWS)
    mean = tl.load(moments_ptr + c)
    inverse = tl.load(moments_ptr + C + c)
    if tl.program_id(0) == 0:
        tl.store(daffine_ptr + c, product * inverse)
        tl.store(daffine_ptr + C + c, dshift)
    count = pixels.to(tl.float32)
    slope = product / count * inverse * inverse
    dy = g - (dshift / count)[None, :] - (y - mean[None, :]) * slope[None, :]
    dy *= (tl.load(affine_ptr + c) * inverse)[None, :]
    tl.store(dy_ptr + (place(pixel, SIZE, STRIDE) * C)[:, None] + c[None, :], dy.to(dy_ptr.dtype.element_ty))


@triton.jit
def hidden_gradient(
    dy_ptr,  # bordered, (B, H, W, C): the gradient with respect to the second convolution's output
    w_ptr,  # (C, 3, 3, C): its weights
    hidden_ptr,  # bordered, (B, H, W, C): its input, after the ReLU
    y_ptr,  # flat, (B * H * W, C): the first convolution's output
    moments_ptr,  # (2, C): of its batch normalization
    g_ptr,  # flat, (B * H * W, C)
    partial_ptr,  # a row (2, C) for each program
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """g, with respect to the ReLU's input between the convolutions, and what `sum_gradient` would compute from it."""
    c = tl.arange(0, C)
    mean = tl.load(moments_ptr + c)
    total = tl.zeros([C], tl.float32)
    products = tl.zeros([C], tl.float32)
    for tile in range(TILES):
        pixel = (tl.program_id(0) * TILES + tile) * PIXELS + tl.arange(0, PIXELS)
        own = (pixel * C)[:, None] + c[None, :]
        g = convolved(dy_ptr, w_ptr, pixel, SIZE, C, C, 1, True, True)
        hidden = tl.load(hidden_ptr + (place(pixel, SIZE, 1) * C)[:, None] + c[None, :])
        g = tl.where(hidden > 0, g, 0.0).to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + own, g)
        g = g.to(tl.float32)
        total += tl.sum(g, 0)
        products += tl.sum(g * (tl.load(y_ptr + own).to(tl.float32) - mean[None, :]), 0)
    at = partial_ptr + tl.program_id(0) * (2 * C) + c
    tl.store(at, total)
    tl.store(at + C, products)


@triton.jit
def input_gradient(
    dy_ptr,  # bordered, (B, H, W, OUT): the gradient with respect to the first convolution's output, spread out
    w_ptr,  # (OUT, 3, 3, IN): its weights
    g_ptr,  # flat, with respect to the block's output: (B * H * W, IN), or with POOLED (B * H / 2 * W / 2, OUT)
    out_ptr,  # bordered: the block's output, (B, H, W, IN) or (B, H / 2, W / 2, OUT)
    dx_ptr,  # flat, (B * H * W, IN)
    SIZE: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    POOLED: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """dx, the gradient with respect to the block's input, shortcut included. Without POOLED it may be g itself."""
    c = tl.arange(0, IN)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    dx = convolved(dy_ptr, w_ptr, pixel, SIZE, OUT, IN, 1, True, True)
    own = (pixel * IN)[:, None] + c[None, :]
    if POOLED:
        half: tl.constexpr = SIZE // 2
        above = (pixel // (SIZE * SIZE) * half + pixel // SIZE % SIZE // 2) * half + pixel % SIZE // 2
        out = tl.load(out_ptr + (place(above, half, 1) * OUT)[:, None] + c[None, :])
        g = tl.load(g_ptr + (above * OUT)[:, None] + c[None, :]).to(tl.float32) * 0.25
    else:
        out = tl.load(out_ptr + (place(pixel, SIZE, 1) * IN)[:, None] + c[None, :])
        g = tl.load(g_ptr + own).to(tl.float32)
    dx += tl.where(out > 0, g, 0.0)
    tl.store(dx_ptr + own, dx.to(dx_ptr.dtype.element_ty))


@triton.jit
def weight_gradient(
    x_ptr,  # bordered, (B, STRIDE * H, STRIDE * W, IN): the convolution's input
    dy_ptr,  # bordered, (B, STRIDE * H, STRIDE * W, OUT): the gradient with respect to its output, spread out
    partial_ptr,  # a row (OUT, 3, 3, IN) for each program of axis 0
    row_size,  # the distance between such rows
    pixels,  # B * H * W
    SIZE: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Partial sums of the gradient with respect to the weights; axis 1 of the grid is the row of the filter, of 3."""
    width: tl.constexpr = STRIDE * SIZE + 2
    out = tl.arange(0, OUT)
    k = tl.arange(0, 4 * IN)
    dw = tl.zeros([4 * IN, OUT], tl.float32)
    for tile in range(TILES):
        pixel = (tl.program_id(0) * TILES + tile) * PIXELS + tl.arange(0, PIXELS)
        exists = (pixel < pixels)[:, None]
        at = place(pixel, SIZE, STRIDE)
        corner = at - width - 1 + tl.program_id(1) * width
        x = tl.load(x_ptr + (corner * IN)[:, None] + k[None, :], mask=exists, other=0.0)
        dy = tl.load(dy_ptr + (at * OUT)[:, None] + out[None, :], mask=exists, other=0.0)
        dw = tl.dot(tl.trans(x), dy, dw)
    at = partial_ptr + tl.program_id(0) * row_size + tl.program_id(1) * (3 * IN)
    tl.store(at + (out * (9 * IN))[None, :] + k[:, None], dw, mask=(k < 3 * IN)[:, None])


@triton.jit
def sgd(
    parameter_ptr,  # float32, all of them one after another, each padded to whole chunks
    momentum_ptr,  # float32
    copy_ptr,  # the parameters in the dtype of the activations
    gradient_ptr,  # float32: partial sums
    first_ptr,  # for each chunk: where its first partial gradient begins,
    stride_ptr,  # the distance to the next one,
    rows_ptr,  # how many there are,
    gate_ptr,  # and the index of its gate
    gates_ptr,  # 1 for open, 0 for closed: the gradient is zero
    lr_ptr,  # the learning rate, on the device since a graph would keep a number
    weight_decay,
    CHUNK: tl.constexpr,
):
    """A step of SGD with Nesterov momentum, on one chunk of the parameters."""
    chunk = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    rows = tl.where(tl.load(gates_ptr + tl.load(gate_ptr + chunk)) > 0, tl.load(rows_ptr + chunk), 0)
    first = gradient_ptr + tl.load(first_ptr + chunk)
    stride = tl.load(stride_ptr + chunk)
    partial = tl.zeros([GRADIENTS, CHUNK], tl.float32)
    row = tl.arange(0, GRADIENTS)
    start = 0
    while start < rows:  # not a `range`: the interpreter has trouble with bounds that were loaded
        exists = (start + row < rows)[:, None]
        partial += tl.load(first + ((start + row) * stride)[:, None] + i[None, :], mask=exists, other=0.0)
        start += GRADIENTS
    at = chunk * CHUNK + i
    parameter = tl.load(parameter_ptr + at)
    gradient = tl.sum(partial, 0) + weight_decay * parameter
    momentum = MOMENTUM * tl.load(momentum_ptr + at) + gradient
    parameter -= tl.load(lr_ptr) * (gradient + MOMENTUM * momentum)
    tl.store(momentum_ptr + at, momentum)
    tl.store(parameter_ptr + at, parameter)
    tl.store(copy_ptr + at, parameter.to(copy_ptr.dtype.element_ty))


@triton.jit
def infer(
    x_ptr,  # bordered, (B, STRIDE * H, STRIDE * W, IN)
    w_ptr,  # (OUT, 3, 3, IN)
    affine_ptr,  # (2, OUT)
    running_ptr,  # (2, OUT)
    survival,  # what scales the branch
    shortcut_ptr,  # its input, bordered: (B, H, W, OUT) with SHORTCUT 1, (B, 2 H, 2 W, POOLED) with SHORTCUT 2
    out_ptr,  # bordered, (B, H, W, OUT)
    SIZE: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    SHORTCUT: tl.constexpr,
    POOLED: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """ReLU(survival * bn(convolution) + shortcut) in inference. With SHORTCUT 1, its input and out may be the same."""
    c = tl.arange(0, OUT)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y = convolved(x_ptr, w_ptr, pixel, SIZE, IN, OUT, STRIDE, False, False)
    scale = tl.load(affine_ptr + c) / tl.sqrt(tl.load(running_ptr + OUT + c) + EPSILON)
    y = (y - tl.load(running_ptr + c)[None, :]) * scale[None, :] + tl.load(affine_ptr + OUT + c)[None, :]
    y *= survival
    inside = (place(pixel, SIZE, 1) * OUT)[:, None] + c[None, :]
    if SHORTCUT == 1:
        y += tl.load(shortcut_ptr + inside).to(tl.float32)
    if SHORTCUT == 2:
        y += pooled(shortcut_ptr, pixel, c, SIZE, POOLED)
    tl.store(out_ptr + inside, tl.maximum(y, 0.0).to(out_ptr.dtype.element_ty))
