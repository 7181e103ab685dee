// The harness around a design that yosys made (write_cxxrtl; DESIGN_CLASS is its class).
#include "design.cc"
#include "harness.h"

struct Design {
    cxxrtl_design::DESIGN_CLASS top;
    void clock(bool level) { top.p_clk.set<bool>(level); }
    void reset(bool level) { top.p_reset.set<bool>(level); }
    bool in_ready() { return top.p_in__ready.get<bool>(); }
    bool out_valid() { return top.p_out__valid.get<bool>(); }
    bool out_last() { return top.p_out__last.get<bool>(); }
#ifdef STEP_NUMBER
    unsigned step() { return top.p_step__number.get<uint32_t>(); }
    bool misaligned() { return top.p_misaligned.get<bool>(); }
#else
    unsigned step() { return 0; }
    bool misaligned() { return false; }
#endif
    void set_in(bool valid, const uint32_t *chunks, bool last) {
        top.p_in__valid.set<bool>(valid);
        top.p_in__last.set<bool>(last);
        for (unsigned i = 0; i < CHUNKS; i++) top.p_in__data.data[i] = chunks[i];
    }
    void get_out(uint32_t *chunks) {
        for (unsigned i = 0; i < CHUNKS; i++) chunks[i] = chunk(top.p_out__data, i);
    }
    void set_out_ready(bool level) { top.p_out__ready.set<bool>(level); }
    void settle() { top.step(); }

    template <std::size_t N> static uint32_t chunk(const cxxrtl::wire<N> &port, unsigned i) { return port.curr.data[i]; }
    template <std::size_t N> static uint32_t chunk(const cxxrtl::value<N> &port, unsigned i) { return port.data[i]; }
};

int main(int argc, char **argv) {
    Design design;
    return run(design, argc, argv);
}
