// Walks one step of the program: six nested loops, from the inside out
//   0 word of the tap, 1 column of the window, 2 row of the window, 3 group of outputs, 4 output column, 5 output row.
// Addresses and window coordinates are only ever incremented: a loop level has its own increment, made by the generator.
// A group may be followed by idle cycles, so that its results are drained before the next group's arrive.
module mac_array_sequencer #(
    parameter COUNT = 8,
    parameter IDLE = 4,
    parameter FEATURE_ADDRESS = 10,
    parameter WEIGHT_ADDRESS = 10,
    parameter SLICES = 4,  // taps of a step by channel that share a weight word
    parameter SLICE = 4,
    parameter COORDINATE = 8
) (
    input wire clk,
    input wire reset,
    input wire start,    // one cycle; everything below is constant until the step ends
    input wire walk,     // with start: walk the loops (a step that only sends its words out does not)
    input wire advance,  // one word further, for a step that sends its words out
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
    input wire weight_sliced,  // a weight word holds one weight row per tap, not all lanes of one tap
    input wire weight_fixed,   // every tap uses the same weights
    input wire [IDLE-1:0] idle,
    // one multiply-accumulate of all lanes; the memories are read at the end of the cycle
    output reg valid,
    output reg first,
    output reg last,
    output reg last_group,
    output reg last_of_step,
    output wire outside,  // the word is padding
    output reg [FEATURE_ADDRESS-1:0] feature_address,
    output reg [WEIGHT_ADDRESS-1:0] weight_address,
    output reg [SLICE-1:0] slice
);
    reg running;
    reg pausing;
    reg [IDLE-1:0] pause_left;
    reg first_next;
    wire issue = running && !pausing;

    // --- the loops
    wire [5:0] at_last;
    wire [5:0] steps = {
        issue && (&at_last[4:0]), issue && (&at_last[3:0]), issue && (&at_last[2:0]),
        issue && (&at_last[1:0]), issue && at_last[0], issue
    };
    genvar level;
    generate
        for (level = 0; level < 6; level = level + 1) begin : loops
            mac_array_counter #(.WIDTH(COUNT)) counter (
                .clk(clk), .load(start), .step(steps[level]),
                .last(loop_last[level*COUNT +: COUNT]), .at_last(at_last[level])
            );
        end
    endgenerate
    wire group_ends = at_last[0] && at_last[1] && at_last[2];
    wire pixel_ends = group_ends && at_last[3];
    wire step_ends = pixel_ends && at_last[4] && at_last[5];

    always @(posedge clk) begin
        if (reset) begin
            running <= 1'b0;
            pausing <= 1'b0;
        end else if (start) begin
            running <= walk;
            pausing <= 1'b0;
        end else if (issue) begin
            if (step_ends) running <= 1'b0;
            pausing <= group_ends && (idle != 0);
        end else if (pausing) begin
            pausing <= (pause_left != 1);
        end
        if (issue) pause_left <= idle;
        else pause_left <= pause_left - 1'b1;
        if (start) first_next <= 1'b1;
        else if (issue) first_next <= group_ends;
    end

    // --- the increments, chosen one cycle before they are added
    reg [FEATURE_ADDRESS-1:0] feature_change;
    reg [COORDINATE-1:0] row_change;
    reg [COORDINATE-1:0] column_change;
    reg weight_restart;

    always @(posedge clk) begin
        if (!at_last[0]) feature_change <= feature_increment[0 +: FEATURE_ADDRESS];
        else if (!at_last[1]) feature_change <= feature_increment[1*FEATURE_ADDRESS +: FEATURE_ADDRESS];
        else if (!at_last[2]) feature_change <= feature_increment[2*FEATURE_ADDRESS +: FEATURE_ADDRESS];
        else if (!at_last[3]) feature_change <= feature_increment[3*FEATURE_ADDRESS +: FEATURE_ADDRESS];
        else if (!at_last[4]) feature_change <= feature_increment[4*FEATURE_ADDRESS +: FEATURE_ADDRESS];
        else feature_change <= feature_increment[5*FEATURE_ADDRESS +: FEATURE_ADDRESS];
        if (!at_last[0]) row_change <= row_increment[0 +: COORDINATE];
        else if (!at_last[1]) row_change <= row_increment[1*COORDINATE +: COORDINATE];
        else if (!at_last[2]) row_change <= row_increment[2*COORDINATE +: COORDINATE];
        else if (!at_last[3]) row_change <= row_increment[3*COORDINATE +: COORDINATE];
        else if (!at_last[4]) row_change <= row_increment[4*COORDINATE +: COORDINATE];
        else row_change <= row_increment[5*COORDINATE +: COORDINATE];
        if (!at_last[0]) column_change <= column_increment[0 +: COORDINATE];
        else if (!at_last[1]) column_change <= column_increment[1*COORDINATE +: COORDINATE];
        else if (!at_last[2]) column_change <= column_increment[2*COORDINATE +: COORDINATE];
        else if (!at_last[3]) column_change <= column_increment[3*COORDINATE +: COORDINATE];
        else if (!at_last[4]) column_change <= column_increment[4*COORDINATE +: COORDINATE];
        else column_change <= column_increment[5*COORDINATE +: COORDINATE];
        weight_restart <= pixel_ends;
        valid <= !reset && issue;
        first <= first_next;
        last <= group_ends;
        last_group <= at_last[3];
        last_of_step <= step_ends;
    end

    // --- the addresses
    reg [COORDINATE-1:0] row;
    reg [COORDINATE-1:0] column;
    assign outside = padded && (row >= rows || column >= columns);

    always @(posedge clk) begin
        if (start) begin
            feature_address <= feature_base;
            row <= row_base;
            column <= column_base;
        end else if (valid) begin
            feature_address <= feature_address + feature_change;
            row <= row + row_change;
            column <= column + column_change;
        end else if (advance) begin
            feature_address <= feature_address + 1'b1;
        end
        if (start || (valid && weight_restart)) begin
            weight_address <= weight_base;
            slice <= 0;
        end else if (valid && !weight_fixed) begin
            if (weight_sliced) slice <= (slice == SLICES - 1) ? 0 : slice + 1'b1;
            if (!weight_sliced || slice == SLICES - 1) weight_address <= weight_address + 1'b1;
        end
    end
endmodule
