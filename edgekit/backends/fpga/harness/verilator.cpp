// The harness around a design that Verilator made (class Vdesign).
#include "Vdesign.h"
#include "verilated.h"
#include "harness.h"

template <class T> static void put(T &port, const uint32_t *chunks) {
    uint64_t value = chunks[0];
    if (CHUNKS > 1) value |= (uint64_t)chunks[CHUNKS > 1] << 32;
    port = (T)value;
}
template <class T> static void get(const T &port, uint32_t *chunks) {
    chunks[0] = (uint32_t)port;
    if (CHUNKS > 1) chunks[CHUNKS > 1] = (uint32_t)((uint64_t)port >> 32);
}
template <std::size_t N> static void put(VlWide<N> &port, const uint32_t *chunks) {
    for (std::size_t i = 0; i < N; i++) port[i] = chunks[i];
}
template <std::size_t N> static void get(const VlWide<N> &port, uint32_t *chunks) {
    for (std::size_t i = 0; i < N; i++) chunks[i] = port[i];
}

struct Design {
    VerilatedContext context;
    Vdesign top;
    // registers and memories begin with random bits: a result that depends on them shows
    static VerilatedContext *random(VerilatedContext *context) {
        context->randReset(2);
        context->randSeed(1);
        return context;
    }
    Design() : top(random(&context)) {}
    ~Design() { top.final(); }
    void clock(bool level) { top.clk = level; }
    void reset(bool level) { top.reset = level; }
    bool in_ready() { return top.in_ready; }
    bool out_valid() { return top.out_valid; }
    bool out_last() { return top.out_last; }
#ifdef STEP_NUMBER
    unsigned step() { return top.step_number; }
    bool misaligned() { return top.misaligned; }
#else
    unsigned step() { return 0; }
    bool misaligned() { return false; }
#endif
    void set_in(bool valid, const uint32_t *chunks, bool last) {
        top.in_valid = valid;
        top.in_last = last;
        put(top.in_data, chunks);
    }
    void get_out(uint32_t *chunks) { get(top.out_data, chunks); }
    void set_out_ready(bool level) { top.out_ready = level; }
    void settle() { top.eval(); }
};

int main(int argc, char **argv) {
    Design design;
    return run(design, argc, argv);
}
