// Layers on integers in HWC order. Every layer ends with requantization: rounded half up, saturated.
// EDGEKIT_PLAIN: plain integers for a C++ compiler; otherwise the exact widths of ap_int.
#ifndef EDGEKIT_LAYERS_H
#define EDGEKIT_LAYERS_H

#ifdef EDGEKIT_PLAIN
#include <cstdint>
template <int BITS> using integer = std::int64_t;
#else
#include <ap_int.h>
template <int BITS> using integer = ap_int<BITS>;
#endif

// Sums have at most 32 bits; what is shifted to the left is bounded first, so that 48 bits hold it.
typedef integer<33> sum_t;
typedef integer<48> wide_t;

inline wide_t requantized(sum_t sum, int shift, int low, int high) {
#pragma HLS INLINE
    wide_t value = sum;
    if (shift > 0) {
        value += wide_t(1) << (shift - 1);
        value >>= shift;
    } else {
        if (value > 256) value = 256;
        if (value < -256) value = -256;
        // a product, since a negative number is not shifted to the left in C++
        value *= wide_t(1) << -shift;
    }
    if (value > high) value = high;
    if (value < low) value = low;
    return value;
}

// H, W, C: input. OH, OW, O: output. KH, KW: kernel. SH, SW: strides. TOP, LEFT: padding.
// SHARED: all output channels have shift[0].
template <int H, int W, int C, int OH, int OW, int O, int KH, int KW, int SH, int SW, int TOP, int LEFT, bool SHARED,
          class X, class Y, class K, class B, class S>
void convolution(const X *x, Y *y, const K *weights, const B *bias, const S *shift, int low, int high) {
    for (int r = 0; r < OH; r++)
        for (int c = 0; c < OW; c++)
            for (int o = 0; o < O; o++) {
                sum_t sum = bias[o];
                for (int i = 0; i < KH; i++)
                    for (int j = 0; j < KW; j++)
                        for (int k = 0; k < C; k++) {
#pragma HLS PIPELINE II = 1
                            const int row = r * SH + i - TOP, column = c * SW + j - LEFT;
                            if (row >= 0 && row < H && column >= 0 && column < W)
                                sum += weights[((o * KH + i) * KW + j) * C + k] * x[(row * W + column) * C + k];
                        }
                y[(r * OW + c) * O + o] = requantized(sum, shift[SHARED ? 0 : o], low, high);
            }
}

template <int H, int W, int C, int OH, int OW, int KH, int KW, int SH, int SW, int TOP, int LEFT, bool SHARED, class X,
          class Y, class K, class B, class S>
void depthwise(const X *x, Y *y, const K *weights, const B *bias, const S *shift, int low, int high) {
    for (int r = 0; r < OH; r++)
        for (int c = 0; c < OW; c++)
            for (int o = 0; o < C; o++) {
                sum_t sum = bias[o];
                for (int i = 0; i < KH; i++)
                    for (int j = 0; j < KW; j++) {
#pragma HLS PIPELINE II = 1
                        const int row = r * SH + i - TOP, column = c * SW + j - LEFT;
                        if (row >= 0 && row < H && column >= 0 && column < W)
                            sum += weights[(o * KH + i) * KW + j] * x[(row * W + column) * C + o];
                    }
                y[(r * OW + c) * C + o] = requantized(sum, shift[SHARED ? 0 : o], low, high);
            }
}

// MAXIMUM: of the window, else the sum of the window times `multiplier`; padding counts as 0 in a sum and never wins.
template <int H, int W, int C, int OH, int OW, int KH, int KW, int SH, int SW, int TOP, int LEFT, bool MAXIMUM, class X,
          class Y>
void pool(const X *x, Y *y, int multiplier, int shift, int low, int high) {
    for (int r = 0; r < OH; r++)
        for (int c = 0; c < OW; c++)
            for (int o = 0; o < C; o++) {
                sum_t sum = MAXIMUM ? -128 : 0;
                for (int i = 0; i < KH; i++)
                    for (int j = 0; j < KW; j++) {
#pragma HLS PIPELINE II = 1
                        const int row = r * SH + i - TOP, column = c * SW + j - LEFT;
                        if (row >= 0 && row < H && column >= 0 && column < W) {
                            const sum_t value = x[(row * W + column) * C + o];
                            if (!MAXIMUM) sum += value;
                            else if (value > sum) sum = value;
                        }
                    }
                y[(r * OW + c) * C + o] = requantized(sum * multiplier, shift, low, high);
            }
}

template <int SIZE, class A, class B, class Y>
void addition(const A *a, const B *b, Y *y, int left, int right, int shift, int low, int high) {
    for (int i = 0; i < SIZE; i++) {
#pragma HLS PIPELINE II = 1
        const sum_t sum = sum_t(a[i]) * (1 << left) + sum_t(b[i]) * (1 << right);
        y[i] = requantized(sum, shift, low, high);
    }
}

// One operand of a concatenation: C channels of every position, from channel AT of O.
template <int POSITIONS, int C, int O, int AT, class X, class Y>
void placed(const X *x, Y *y, int shift, int low, int high) {
    for (int p = 0; p < POSITIONS; p++)
        for (int c = 0; c < C; c++) {
#pragma HLS PIPELINE II = 1
            y[p * O + AT + c] = requantized(sum_t(x[p * C + c]), shift, low, high);
        }
}

#endif
