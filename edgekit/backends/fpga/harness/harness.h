// Sends words through a design, with or without gaps on both streams, and keeps what comes out and the cycles.
// input.bin, output.bin: words of ceil(WORD_BITS / 32) uint32 each. cycles.txt: a line per inference: cycles, cycles per step.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

static const unsigned CHUNKS = (WORD_BITS + 31) / 32;

// Design: clock(level), reset(level), in_ready(), out_valid(), out_last(), step(), misaligned(), set_in(valid, chunks, last),
// get_out(chunks), set_out_ready(level), settle().
template <class Design> int run(Design &design, int argc, char **argv) {
    if (argc != 5) {
        std::fprintf(stderr, "usage: %s inferences steps seed limit\n", argv[0]);
        return 2;
    }
    const uint64_t inferences = std::strtoull(argv[1], nullptr, 10);
    const unsigned steps = std::strtoul(argv[2], nullptr, 10);
    uint32_t dice = std::strtoul(argv[3], nullptr, 10);
    const uint64_t limit = std::strtoull(argv[4], nullptr, 10);
    const bool gaps = dice != 0;

    std::vector<uint32_t> words(inferences * IN_WORDS * CHUNKS);
    std::FILE *in = std::fopen("input.bin", "rb");
    if (!in || std::fread(words.data(), 4, words.size(), in) != words.size()) {
        std::fprintf(stderr, "error: input.bin is missing or short\n");
        return 2;
    }
    std::fclose(in);
    std::FILE *out = std::fopen("output.bin", "wb");
    std::FILE *timing = std::fopen("cycles.txt", "w");
    if (!out || !timing) return 2;

    const std::vector<uint32_t> nothing(CHUNKS, 0);
    std::vector<uint32_t> word(CHUNKS);
    std::vector<uint64_t> spent(steps, 0), began(inferences, 0);
    uint64_t sent = 0, received = 0, cycle = 0, quiet = 0;
    bool in_valid = false, out_ready = false, in_reset = true;
    bool waited = false, waited_last = false;  // an output word was there and not taken
    std::vector<uint32_t> waiting(CHUNKS);
    unsigned held = 0;
    design.clock(false);
    design.reset(true);
    design.set_in(false, nothing.data(), false);
    design.set_out_ready(false);

    while (received < inferences * OUT_WORDS) {
        // a rising edge, then what is driven after it
        const bool accepted = !in_reset && in_valid && design.in_ready();
        const bool taken = !in_reset && out_ready && design.out_valid();
        const bool busy = accepted || sent % IN_WORDS != 0 || received < (sent / IN_WORDS) * OUT_WORDS;
        if (!in_reset && busy) {
            const unsigned step = design.step();
            if (step < steps) spent[step]++;
        }
        if (accepted && sent % IN_WORDS == 0) began[sent / IN_WORDS] = cycle;
        if (taken) {
            design.get_out(word.data());
            std::fwrite(word.data(), 4, CHUNKS, out);
            const bool last = received % OUT_WORDS == OUT_WORDS - 1;
            if (design.out_last() != last) {
                std::fprintf(timing, "error: last is %d on output word %llu\n", !last, (unsigned long long)received);
                break;
            }
            if (last) {
                std::fprintf(timing, "%llu", (unsigned long long)(cycle - began[received / OUT_WORDS] + 1));
                for (auto &count : spent) {
                    std::fprintf(timing, " %llu", (unsigned long long)count);
                    count = 0;
                }
                std::fprintf(timing, "\n");
            }
            received++;
        }
        if (waited) {
            design.get_out(word.data());
            if (!design.out_valid() || word != waiting || design.out_last() != waited_last) {
                std::fprintf(timing, "error: output word %llu changed while it waited\n", (unsigned long long)received);
                break;
            }
        }
        waited = !in_reset && design.out_valid() && !out_ready;
        waited_last = design.out_last();
        design.get_out(waiting.data());
        if (!in_reset && design.misaligned()) {
            std::fprintf(timing, "error: the design expects the last word of an inference elsewhere than after %u\n", IN_WORDS);
            break;
        }
        quiet = (accepted || taken) ? 0 : quiet + 1;
        if (quiet > limit) {
            std::fprintf(timing, "error: no word in or out for %llu cycles\n", (unsigned long long)limit);
            break;
        }
        design.clock(true);
        design.settle();
        cycle++;
        if (gaps) {
            dice ^= dice << 13;
            dice ^= dice >> 17;
            dice ^= dice << 5;
        }
        if (in_reset) {
            if (++held == 4) in_reset = false;
            design.reset(in_reset);
        } else {
            if (accepted) sent++;
            if (accepted || !in_valid) {
                in_valid = sent < inferences * IN_WORDS && (!gaps || (dice & 1));
                const bool last = in_valid && sent % IN_WORDS == IN_WORDS - 1;
                design.set_in(in_valid, in_valid ? &words[sent * CHUNKS] : nothing.data(), last);
            }
            out_ready = !gaps || ((dice >> 8) & 1);
            design.set_out_ready(out_ready);
        }
        design.clock(false);
        design.settle();
    }
    std::fclose(out);
    std::fclose(timing);
    return 0;
}
