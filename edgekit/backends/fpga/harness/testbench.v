// Sends the words of input.hex through the design, with or without gaps on both streams, and writes what comes out.
// The gaps come from the same generator as in harness.h, so that all simulators take the same cycles.
`timescale 1ns / 1ps
module testbench;
    parameter WORD = 32;
    parameter IN_WORDS = 1;   // words of one inference
    parameter OUT_WORDS = 1;
    parameter INFERENCES = 1;
    parameter STEPS = 1;      // values of the step number; 1 where the design has none
    parameter STEP_BITS = 1;
    parameter [31:0] SEED = 0;  // 0: no gaps
    parameter LIMIT = 1000000;  // cycles without a word in or out after which the design counts as stuck

    reg clk = 0;
    reg reset = 1;
    reg in_valid = 0;
    reg [WORD-1:0] in_data = 0;
    reg in_last = 0;
    reg out_ready = 0;
    wire in_ready, out_valid, out_last;
    wire [WORD-1:0] out_data;
    wire [STEP_BITS-1:0] step_number;
    wire misaligned;
`ifdef STEP_NUMBER
    `DESIGN under_test (
        .clk(clk), .reset(reset), .in_valid(in_valid), .in_ready(in_ready), .in_data(in_data), .in_last(in_last),
        .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data), .out_last(out_last),
        .misaligned(misaligned), .step_number(step_number)
    );
`else
    assign step_number = 0;
    assign misaligned = 0;
    `DESIGN under_test (
        .clk(clk), .reset(reset), .in_valid(in_valid), .in_ready(in_ready), .in_data(in_data), .in_last(in_last),
        .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data), .out_last(out_last)
    );
`endif

    reg [WORD-1:0] words [0:IN_WORDS*INFERENCES-1];
    integer result, timing;
    integer sent = 0;       // words accepted
    integer received = 0;
    integer cycle = 0;
    integer quiet = 0;
    integer held = 0;       // cycles of reset
    integer i;
    integer began [0:INFERENCES-1];
    integer spent [0:STEPS-1];
    reg [31:0] dice = SEED;
    reg [31:0] mixed;
    reg accepted, taken;
    reg waited = 0;  // an output word was there and not taken
    reg waited_last;
    reg [WORD-1:0] waiting;

    initial begin
        $readmemh("input.hex", words);
        result = $fopen("output.hex", "w");
        timing = $fopen("cycles.txt", "w");
        for (i = 0; i < STEPS; i = i + 1) spent[i] = 0;
    end

    always #5 clk = !clk;

    // everything is sampled just before the edge and driven just after it
    always @(negedge clk) begin
        accepted = !reset && in_valid && in_ready;
        taken = !reset && out_valid && out_ready;
        if (!reset && (accepted || sent % IN_WORDS != 0 || received < (sent / IN_WORDS) * OUT_WORDS))
            spent[step_number] = spent[step_number] + 1;
        if (accepted && sent % IN_WORDS == 0) began[sent / IN_WORDS] = cycle;
        if (taken) begin
            $fdisplay(result, "%h", out_data);
            if (out_last != (received % OUT_WORDS == OUT_WORDS - 1)) begin
                $fdisplay(timing, "error: last is %b on output word %0d", out_last, received);
                $finish;
            end
            if (out_last) begin
                $fwrite(timing, "%0d", cycle - began[received / OUT_WORDS] + 1);
                for (i = 0; i < STEPS; i = i + 1) begin
                    $fwrite(timing, " %0d", spent[i]);
                    spent[i] = 0;
                end
                $fwrite(timing, "\n");
            end
            received = received + 1;
        end
        quiet = (accepted || taken) ? 0 : quiet + 1;
        if (received == OUT_WORDS*INFERENCES) $finish;
        if (waited && (out_valid !== 1'b1 || out_data !== waiting || out_last !== waited_last)) begin
            $fdisplay(timing, "error: output word %0d changed while it waited", received);
            $finish;
        end
        waited = !reset && out_valid && !out_ready;
        waited_last = out_last;
        waiting = out_data;
        if (!reset && misaligned) begin
            $fdisplay(timing, "error: the design expects the last word of an inference elsewhere than after %0d", IN_WORDS);
            $finish;
        end
        if (quiet > LIMIT) begin
            $fdisplay(timing, "error: no word in or out for %0d cycles", LIMIT);
            $finish;
        end
    end

    always @(posedge clk) begin
        #1;
        cycle = cycle + 1;
        if (SEED != 0) begin
            mixed = dice ^ (dice << 13);
            mixed = mixed ^ (mixed >> 17);
            dice = mixed ^ (mixed << 5);
        end
        if (reset) begin
            held = held + 1;
            if (held == 4) reset = 0;
        end else begin
            if (accepted) sent = sent + 1;
            if (accepted || !in_valid) begin
                in_valid = sent < IN_WORDS*INFERENCES && (SEED == 0 || dice[0]);
                if (in_valid) in_data = words[sent];
                in_last = in_valid && sent % IN_WORDS == IN_WORDS - 1;
            end
            out_ready = SEED == 0 || dice[8];
        end
    end
endmodule
