// The engine: takes one inference in as a stream of words, runs the program's steps, sends the result out.
// The memories of weights, biases and program are outside (made by the generator), as is the decoding of the program word.
module mac_array_engine #(
    parameter P = 16,
    parameter Q = 4,
    parameter LEVELS = 2,
    parameter SELECT = 2,           // log2 of the banks of feature maps
    parameter BANKS = 4,
    parameter ACTIVATION = 8,
    parameter WEIGHT = 8,
    parameter SLICE = 4,
    parameter ACCUMULATOR = 32,
    parameter BIAS = 32,
    parameter SHIFT = 6,
    parameter LEFT = 0,
    parameter MULTIPLIER = 0,
    parameter MULTIPLICAND = 18,
    parameter WIDE = 33,
    parameter DRAIN = 3,
    parameter IDLE = 3,
    parameter COUNT = 8,
    parameter COORDINATE = 8,
    parameter BANK_WORDS = 256,
    parameter FEATURE_ADDRESS = 10,
    parameter WEIGHT_ADDRESS = 10,
    parameter BIAS_ADDRESS = 8,
    parameter PROGRAM_ADDRESS = 6,
    parameter STEP_WORDS = 14,      // program words of a step
    parameter BY_CHANNEL = 1,
    parameter MAXIMUM = 1,
    parameter INPUT_BASE = 0,
    parameter INPUT_WORDS = 16,
    parameter OUTPUT_WORDS = 1,
    parameter STEP_NUMBER = 8
) (
    input wire clk,
    input wire reset,
    input wire in_valid,
    output wire in_ready,
    input wire [Q*ACTIVATION-1:0] in_data,
    input wire in_last,
    output reg out_valid,
    input wire out_ready,
    output reg [Q*ACTIVATION-1:0] out_data,
    output reg out_last,
    output reg misaligned,  // in_last was not on the last word of an inference: reset is needed
    output reg [STEP_NUMBER-1:0] step_number,  // 0 while loading, then 1, 2, ...
    // memories, read with one cycle of delay
    output wire [WEIGHT_ADDRESS-1:0] weight_address,
    input wire [P*Q*WEIGHT-1:0] weight_data,
    output wire [BIAS_ADDRESS-1:0] bias_address,
    input wire [Q*(BIAS+SHIFT)-1:0] bias_data,
    output reg [PROGRAM_ADDRESS-1:0] program_address,
    output wire program_shift,  // the program word of the previous cycle's address moves into the step's registers
    // the step's registers
    input wire [6*COUNT-1:0] loop_last,
    input wire [6*FEATURE_ADDRESS-1:0] feature_increment,
    input wire [6*COORDINATE-1:0] row_increment,
    input wire [6*COORDINATE-1:0] column_increment,
    input wire [FEATURE_ADDRESS-1:0] feature_base,
    input wire [COORDINATE-1:0] row_base,
    input wire [COORDINATE-1:0] column_base,
    input wire [COORDINATE-1:0] rows,
    input wire [COORDINATE-1:0] columns,
    input wire padded,
    input wire [WEIGHT_ADDRESS-1:0] weight_base,
    input wire weight_fixed,
    input wire [IDLE-1:0] idle,
    input wire by_channel,
    input wire maximum,
    input wire [DRAIN-1:0] words_full,
    input wire [DRAIN-1:0] words_last,
    input wire [FEATURE_ADDRESS-1:0] output_base,
    input wire [FEATURE_ADDRESS-1:0] output_pixel,
    input wire [BIAS_ADDRESS-1:0] bias_base,
    input wire bias_repeat,
    input wire scaled,
    input wire [(MULTIPLIER > 0 ? MULTIPLIER : 1)-1:0] multiplier,
    input wire [ACTIVATION-1:0] low,
    input wire [ACTIVATION-1:0] high,
    input wire sends  // the step sends words out and computes nothing
);
    localparam [2:0] LOADING = 3'd0, FETCHING = 3'd1, STARTING = 3'd2, RUNNING = 3'd3, SENDING = 3'd4;
    localparam FETCH = 8;
    localparam WORDS = 20;
    reg [2:0] state;
    reg [FETCH-1:0] fetched;
    reg fetching_data;
    reg [WORDS-1:0] words_left;
    reg [FEATURE_ADDRESS-1:0] load_address;
    reg fresh;

    wire start = (state == STARTING);
    wire load = in_valid && in_ready;
    wire send_room = !out_valid || out_ready;
    wire send = (state == SENDING) && fresh && send_room && words_left != 0;
    wire step_done;
    assign in_ready = (state == LOADING);
    assign program_shift = fetching_data;

    // --- sequencer, lanes, requantizer
    wire issue, first, last, last_group, last_of_step, outside;
    wire [FEATURE_ADDRESS-1:0] feature_address;
    wire [SLICE-1:0] slice;
    wire [Q*ACTIVATION-1:0] feature_word;
    wire [BANKS*Q*ACTIVATION-1:0] feature_row;
    wire sums_valid, sums_pixel_ends, sums_step_ends;
    wire [Q*ACCUMULATOR-1:0] sums;
    wire result_write;
    wire [FEATURE_ADDRESS-1:0] result_address;
    wire [Q*ACTIVATION-1:0] result;

    mac_array_sequencer #(
        .COUNT(COUNT), .IDLE(IDLE), .FEATURE_ADDRESS(FEATURE_ADDRESS), .WEIGHT_ADDRESS(WEIGHT_ADDRESS),
        .SLICES(Q), .SLICE(SLICE), .COORDINATE(COORDINATE)
    ) sequencer (
        .clk(clk), .reset(reset), .start(start), .walk(!sends), .advance(send),
        .loop_last(loop_last), .feature_increment(feature_increment),
        .row_increment(row_increment), .column_increment(column_increment),
        .feature_base(feature_base), .row_base(row_base), .column_base(column_base),
        .rows(rows), .columns(columns), .padded(padded),
        .weight_base(weight_base), .weight_sliced(by_channel), .weight_fixed(weight_fixed),
        .idle(idle),
        .valid(issue), .first(first), .last(last), .last_group(last_group), .last_of_step(last_of_step),
        .outside(outside), .feature_address(feature_address), .weight_address(weight_address), .slice(slice)
    );

    mac_array_lanes #(
        .P(P), .Q(Q), .LEVELS(LEVELS), .BANKS(BANKS), .ACTIVATION(ACTIVATION), .WEIGHT(WEIGHT), .SLICE(SLICE),
        .ACCUMULATOR(ACCUMULATOR), .DRAIN(DRAIN), .BY_CHANNEL(BY_CHANNEL), .MAXIMUM(MAXIMUM)
    ) lanes (
        .clk(clk), .reset(reset), .by_channel(by_channel), .maximum(maximum),
        .words_full(words_full), .words_last(words_last),
        .valid(issue), .first(first), .last(last), .last_group(last_group), .last_of_step(last_of_step),
        .outside(outside), .slice(slice), .word(feature_word), .row(feature_row), .weights(weight_data),
        .out_valid(sums_valid), .out_sums(sums), .out_pixel_ends(sums_pixel_ends), .out_step_ends(sums_step_ends)
    );

    mac_array_requantize #(
        .Q(Q), .ACTIVATION(ACTIVATION), .ACCUMULATOR(ACCUMULATOR), .BIAS(BIAS), .SHIFT(SHIFT), .LEFT(LEFT),
        .MULTIPLIER(MULTIPLIER), .MULTIPLICAND(MULTIPLICAND), .FEATURE_ADDRESS(FEATURE_ADDRESS),
        .BIAS_ADDRESS(BIAS_ADDRESS), .WIDE(WIDE)
    ) requantize (
        .clk(clk), .reset(reset), .start(start), .output_base(output_base), .output_pixel(output_pixel),
        .bias_base(bias_base), .bias_repeat(bias_repeat), .scaled(scaled), .multiplier(multiplier),
        .low(low), .high(high), .in_valid(sums_valid), .in_sums(sums), .in_pixel_ends(sums_pixel_ends),
        .in_step_ends(sums_step_ends), .bias_address(bias_address), .biases(bias_data),
        .write(result_write), .write_address(result_address), .write_data(result), .done(step_done)
    );

    reg feature_write;
    reg [FEATURE_ADDRESS-1:0] feature_write_address;
    reg [Q*ACTIVATION-1:0] feature_write_data;
    always @(posedge clk) begin
        feature_write <= !reset && (load || result_write);
        feature_write_address <= (state == LOADING) ? load_address : result_address;
        feature_write_data <= (state == LOADING) ? in_data : result;
    end
    mac_array_memory #(
        .WIDTH(Q*ACTIVATION), .SELECT(SELECT), .BANKS(BANKS), .DEPTH(BANK_WORDS), .ADDRESS(FEATURE_ADDRESS)
    ) features (
        .clk(clk), .write(feature_write), .write_address(feature_write_address), .write_data(feature_write_data),
        .read_address(feature_address), .read_word(feature_word), .read_row(feature_row)
    );

    // --- loading, fetching a step's registers, running it, sending
    always @(posedge clk) begin
        fetching_data <= (state == FETCHING) && fetched != STEP_WORDS;
        if (reset) begin
            state <= LOADING;
            words_left <= INPUT_WORDS;
            load_address <= INPUT_BASE;
            program_address <= 0;
            step_number <= 0;
            fetched <= 0;
            out_valid <= 1'b0;
            out_last <= 1'b0;
            misaligned <= 1'b0;
            fresh <= 1'b0;
        end else begin
            case (state)
                LOADING: if (load) begin
                    load_address <= load_address + 1'b1;
                    words_left <= words_left - 1'b1;
                    if (in_last != (words_left == 1)) misaligned <= 1'b1;
                    if (words_left == 1) begin
                        state <= FETCHING;
                        step_number <= 1;
                    end
                end
                FETCHING: begin
                    fetched <= fetched + 1'b1;
                    if (fetched != STEP_WORDS) program_address <= program_address + 1'b1;
                    else begin
                        fetched <= 0;
                        state <= STARTING;
                    end
                end
                STARTING: begin
                    words_left <= OUTPUT_WORDS;
                    fresh <= 1'b0;
                    state <= sends ? SENDING : RUNNING;
                end
                RUNNING: if (step_done) begin
                    state <= FETCHING;
                    step_number <= step_number + 1'b1;
                end
                default: begin
                    fresh <= !send;
                    if (send) begin
                        out_data <= feature_word;
                        out_valid <= 1'b1;
                        out_last <= (words_left == 1);
                        words_left <= words_left - 1'b1;
                    end else if (out_ready) begin
                        out_valid <= 1'b0;
                    end
                    if (out_valid && out_ready && out_last) begin
                        out_last <= 1'b0;
                        state <= LOADING;
                        step_number <= 0;
                        words_left <= INPUT_WORDS;
                        load_address <= INPUT_BASE;
                        program_address <= 0;
                    end
                end
            endcase
        end
    end
endmodule
