"""Small networks of the families that people deploy, of Keras' own layers only: their files load anywhere."""

from __future__ import annotations

import keras
from keras import layers as kl

VOCABULARY = 65  # characters of tinyshakespeare
HIDDEN = VOCABULARY  # the id that stands for a character to be guessed
WINDOW = 64  # characters that the text models read


def mobilenet_v3() -> keras.Model:
    """Howard et al. 2019: inverted residuals, squeeze-excite, hard swish. image: float32 (n, 32, 32, 3) in [-1, 1]."""
    image = kl.Input((32, 32, 3), name="image")
    x = _normed(kl.Conv2D(16, 3, 2, "same", use_bias=False)(image), "hard_silu")
    for kernel, wide, out, squeeze, activation, stride in (
        (3, 16, 16, True, "relu", 1),
        (3, 64, 24, False, "relu", 2),
        (3, 88, 24, False, "relu", 1),
        (5, 96, 40, True, "hard_silu", 1),
        (5, 160, 40, True, "hard_silu", 1),
        (5, 160, 64, True, "hard_silu", 2),
        (5, 256, 64, True, "hard_silu", 1),
    ):
        x = _inverted(x, kernel, wide, out, stride, activation, wide // 4 if squeeze else 0, "hard_sigmoid")
    x = _normed(kl.Conv2D(256, 1, use_bias=False)(x), "hard_silu")
    x = kl.GlobalAveragePooling2D(keepdims=True)(x)
    x = kl.Conv2D(256, 1, activation="hard_silu")(x)
    x = kl.Dropout(0.1)(kl.Flatten()(x))
    return keras.Model(image, kl.Dense(10, name="logits")(x), name="mobilenet_v3")


def efficientnet() -> keras.Model:
    """Tan & Le 2019: inverted residuals with swish and squeeze-excite. image: float32 (n, 32, 32, 3) in [-1, 1]."""
    image = kl.Input((32, 32, 3), name="image")
    x = _normed(kl.Conv2D(16, 3, 2, "same", use_bias=False)(image), "silu")
    for kernel, expand, out, stride in ((3, 1, 16, 1), (3, 6, 24, 2), (3, 6, 24, 1), (5, 6, 40, 2), (5, 6, 40, 1)):
        channels = x.shape[-1]
        x = _inverted(x, kernel, channels * expand, out, stride, "silu", max(4, channels // 4), "sigmoid")
    x = _normed(kl.Conv2D(160, 1, use_bias=False)(x), "silu")
    x = kl.Dropout(0.1)(kl.GlobalAveragePooling2D()(x))
    return keras.Model(image, kl.Dense(10, name="logits")(x), name="efficientnet")


def _normed(x: keras.KerasTensor, activation: str) -> keras.KerasTensor:
    return kl.Activation(activation)(kl.BatchNormalization(momentum=0.9)(x))


def _inverted(
    x: keras.KerasTensor, kernel: int, wide: int, out: int, stride: int, activation: str, squeeze: int, gate: str
) -> keras.KerasTensor:
    """Expand, depthwise, squeeze-excite (to `squeeze` channels, 0: none), project; a residual where shapes allow."""
    before = x
    if wide != x.shape[-1]:
        x = _normed(kl.Conv2D(wide, 1, use_bias=False)(x), activation)
    x = _normed(kl.DepthwiseConv2D(kernel, stride, "same", use_bias=False)(x), activation)
    if squeeze:
        weight = kl.GlobalAveragePooling2D(keepdims=True)(x)
        weight = kl.Conv2D(squeeze, 1, activation="silu" if activation == "silu" else "relu")(weight)
        x = kl.Multiply()([x, kl.Conv2D(wide, 1, activation=gate)(weight)])
    x = kl.BatchNormalization(momentum=0.9)(kl.Conv2D(out, 1, use_bias=False)(x))
    return kl.Add()([before, x]) if before.shape == x.shape else x


def vit() -> keras.Model:
    """Dosovitskiy et al. 2020: 7x7 patches, 4 blocks before a mean. image: float32 (n, 28, 28, 1) in [0, 1]."""
    dim, heads, tokens = 64, 4, 16
    image = kl.Input((28, 28, 1), name="image")
    x = kl.Reshape((tokens, dim))(kl.Conv2D(dim, 7, 7)(image))
    x = _placed(x)
    for _ in range(4):
        x = _block(x, heads, None)
    x = kl.GlobalAveragePooling1D()(kl.LayerNormalization(epsilon=1e-6)(x))
    return keras.Model(image, kl.Dense(10, name="logits")(x), name="vit")


def bert() -> keras.Model:
    """Devlin et al. 2018, a token classifier. ids: int32 (n, 64); mask: int32 (n, 64), 1 where text is.

    Output float32 (n, 64, 4): what follows each character.
    """
    dim, heads = 64, 4
    ids, mask = kl.Input((WINDOW,), dtype="int32", name="ids"), kl.Input((WINDOW,), dtype="int32", name="mask")
    x = kl.LayerNormalization(epsilon=1e-12)(_placed(kl.Embedding(VOCABULARY + 1, dim)(ids)))
    seen = kl.Reshape((1, WINDOW))(mask)  # the attention layer adds a huge negative number where it is 0
    for _ in range(3):
        x = _block_after(x, heads, seen)
    return keras.Model([ids, mask], kl.Dense(4, name="logits")(x), name="bert")


def _placed(x: keras.KerasTensor) -> keras.KerasTensor:
    """A projection whose bias differs by position: the position embedding."""
    return kl.EinsumDense("btd,de->bte", x.shape[1:], bias_axes="te", bias_initializer="random_normal")(x)


def _block(x: keras.KerasTensor, heads: int, mask: keras.KerasTensor | None) -> keras.KerasTensor:
    """Norm first, as in ViT and GPT-2; exact GELU."""
    dim = x.shape[-1]
    y = kl.LayerNormalization(epsilon=1e-6)(x)
    x = kl.Add()([x, kl.MultiHeadAttention(heads, dim // heads)(y, y, attention_mask=mask)])
    y = kl.Dense(2 * dim)(kl.LayerNormalization(epsilon=1e-6)(x))
    return kl.Add()([x, kl.Dense(dim)(kl.Activation("gelu")(y))])


def _block_after(x: keras.KerasTensor, heads: int, mask: keras.KerasTensor) -> keras.KerasTensor:
    """Norm last, as in BERT; exact GELU."""
    dim = x.shape[-1]
    y = kl.MultiHeadAttention(heads, dim // heads)(x, x, attention_mask=mask)
    x = kl.LayerNormalization(epsilon=1e-12)(kl.Add()([x, y]))
    y = kl.Dense(dim)(kl.Activation("gelu")(kl.Dense(4 * dim)(x)))
    return kl.LayerNormalization(epsilon=1e-12)(kl.Add()([x, y]))


def autoencoder() -> keras.Model:
    """Strided convolutions to 16 numbers and back by transposed ones. image: float32 (n, 28, 28, 1) in [0, 1]."""
    image = kl.Input((28, 28, 1), name="image")
    x = kl.Conv2D(16, 3, 2, "same", activation="relu")(image)
    x = kl.Conv2D(32, 3, 2, "same", activation="relu")(x)
    code = kl.Dense(16, name="code")(kl.Flatten()(x))
    x = kl.Reshape((7, 7, 32))(kl.Dense(7 * 7 * 32, activation="relu")(code))
    x = kl.Conv2DTranspose(32, 3, 2, "same", activation="relu")(x)
    x = kl.Conv2DTranspose(16, 3, 2, "same", activation="relu")(x)
    return keras.Model(image, kl.Conv2D(1, 3, 1, "same", activation="sigmoid", name="pixels")(x), name="autoencoder")


def cnn1d() -> keras.Model:
    """Convolutions over a signal, no normalization anywhere. signal: float32 (n, 784, 1) in [0, 1]."""
    signal = kl.Input((784, 1), name="signal")
    x = signal
    for filters, kernel, stride in ((16, 9, 4), (32, 9, 4), (64, 5, 2), (64, 5, 2), (96, 3, 1)):
        x = kl.Conv1D(filters, kernel, stride, "same", activation="relu")(x)
    x = kl.Dense(64, activation="relu")(kl.Flatten()(x))
    return keras.Model(signal, kl.Dense(10, name="logits")(x), name="cnn1d")


def gru() -> keras.Model:
    """The next character. ids: int32 (n, 64); output float32 (n, 65)."""
    ids = kl.Input((WINDOW,), dtype="int32", name="ids")
    x = kl.GRU(96)(kl.Embedding(VOCABULARY + 1, 32)(ids))
    return keras.Model(ids, kl.Dense(VOCABULARY, name="logits")(x), name="gru")


def bilstm() -> keras.Model:
    """The character that is hidden in the middle. ids: int32 (n, 64); output float32 (n, 65)."""
    ids = kl.Input((WINDOW,), dtype="int32", name="ids")
    x = kl.Embedding(VOCABULARY + 1, 32)(ids)
    x = kl.Bidirectional(kl.LSTM(48, return_sequences=True))(x)
    x = kl.Dense(64, activation="tanh")(kl.GlobalMaxPooling1D()(x))
    return keras.Model(ids, kl.Dense(VOCABULARY, name="logits")(x), name="bilstm")
