// P outputs x Q inputs multiply-accumulate lanes: each cycle P dot products of Q words, each added to its accumulator.
// In a step by channel (depthwise, add, pools) output p takes channel p of a row of BANKS words alone, and one slice of
// the weight word: the weights of an output's Q lanes are those of Q taps of its channel.
// The results of a group leave Q at a time while the next group accumulates.
module mac_array_lanes #(
    parameter P = 16,
    parameter Q = 4,
    parameter LEVELS = 2,  // log2 of Q
    parameter BANKS = 4,
    parameter ACTIVATION = 8,
    parameter WEIGHT = 8,
    parameter SLICE = 4,
    parameter ACCUMULATOR = 32,
    parameter DRAIN = 3,
    parameter BY_CHANNEL = 1,  // the network has steps by channel
    parameter MAXIMUM = 1      // the network has maximum pools
) (
    input wire clk,
    input wire reset,
    input wire by_channel,
    input wire maximum,
    input wire [DRAIN-1:0] words_full,  // result words of a group, and of the last group of a pixel
    input wire [DRAIN-1:0] words_last,
    // in the cycle in which the memories are addressed
    input wire valid,
    input wire first,
    input wire last,
    input wire last_group,
    input wire last_of_step,
    input wire outside,
    input wire [SLICE-1:0] slice,
    // one cycle later
    input wire [Q*ACTIVATION-1:0] word,
    input wire [BANKS*Q*ACTIVATION-1:0] row,
    input wire [P*Q*WEIGHT-1:0] weights,
    // results
    output reg out_valid,
    output wire [Q*ACCUMULATOR-1:0] out_sums,
    output wire out_pixel_ends,
    output wire out_step_ends
);
    localparam PRODUCT = ACTIVATION + WEIGHT;
    // cycles from addressing to the sums of products: memory, three registers, the product, the adder tree
    localparam DELAY = 5 + LEVELS;
    localparam SUM = PRODUCT + LEVELS;

    // --- control, delayed as the data are
    reg [DELAY-1:0] valid_at;
    reg [DELAY-1:0] first_at;
    reg [DELAY-1:0] last_at;
    reg [DELAY-1:0] last_group_at;
    reg [DELAY-1:0] last_of_step_at;
    reg [DELAY-1:0] outside_at;
    reg [SLICE-1:0] slice_1;
    reg [SLICE-1:0] slice_2;
    always @(posedge clk) begin
        valid_at <= reset ? {DELAY{1'b0}} : {valid_at[DELAY-2:0], valid};
        first_at <= {first_at[DELAY-2:0], first};
        last_at <= {last_at[DELAY-2:0], last};
        last_group_at <= {last_group_at[DELAY-2:0], last_group};
        last_of_step_at <= {last_of_step_at[DELAY-2:0], last_of_step};
        outside_at <= {outside_at[DELAY-2:0], outside};
        slice_1 <= slice;
        slice_2 <= slice_1;
    end
    wire now_valid = valid_at[DELAY-1];
    wire now_first = first_at[DELAY-1];
    wire now_last = now_valid && last_at[DELAY-1];

    // --- operands: padding is 0, or the lowest number where the maximum is wanted
    localparam ROW = BANKS * Q;  // channels of a step by channel
    localparam [ACTIVATION-1:0] LOWEST = {1'b1, {(ACTIVATION-1){1'b0}}};
    reg [Q*ACTIVATION-1:0] x_1;
    reg [Q*ACTIVATION-1:0] x_2;
    reg [Q*ACTIVATION-1:0] x_3;            // of all outputs; 0 in a step by channel
    reg [ROW*ACTIVATION-1:0] row_1;
    reg [ROW*ACTIVATION-1:0] row_2;
    reg [ROW*ACTIVATION-1:0] own_x_3;      // of the one lane of each output that works in a step by channel
    reg [P*Q*WEIGHT-1:0] w_1;
    reg [P*Q*WEIGHT-1:0] w_2;
    reg [P*Q*WEIGHT-1:0] w_3;
    reg [ROW*WEIGHT-1:0] slice_w_2;
    genvar p;
    genvar q;

    always @(posedge clk) begin
        x_1 <= word;
        x_2 <= outside_at[1] ? {(Q*ACTIVATION){1'b0}} : x_1;
        x_3 <= (BY_CHANNEL && by_channel) ? {(Q*ACTIVATION){1'b0}} : x_2;
        row_1 <= row;
        row_2 <= !outside_at[1] ? row_1 : (MAXIMUM && maximum) ? {ROW{LOWEST}} : {(ROW*ACTIVATION){1'b0}};
        w_1 <= weights;
        w_2 <= w_1;
    end
    generate
        for (p = 0; p < P; p = p + 1) begin : weights_of
            for (q = 0; q < Q; q = q + 1) begin : input_of
                localparam AT = (p*Q + q) * WEIGHT;
                if (BY_CHANNEL && p < ROW && p % Q == q) begin : either
                    always @(posedge clk)
                        w_3[AT +: WEIGHT] <= by_channel ? slice_w_2[p*WEIGHT +: WEIGHT] : w_2[AT +: WEIGHT];
                end else begin : always_full
                    always @(posedge clk) w_3[AT +: WEIGHT] <= w_2[AT +: WEIGHT];
                end
            end
        end
        for (p = 0; p < ROW; p = p + 1) begin : own
            wire [Q*WEIGHT-1:0] taps = w_1[p*Q*WEIGHT +: Q*WEIGHT];
            always @(posedge clk) slice_w_2[p*WEIGHT +: WEIGHT] <= taps[slice_2*WEIGHT +: WEIGHT];
            always @(posedge clk)
                own_x_3[p*ACTIVATION +: ACTIVATION] <= by_channel ? row_2[p*ACTIVATION +: ACTIVATION]
                    : x_2[(p % Q)*ACTIVATION +: ACTIVATION];
        end
    endgenerate

    // --- the maximum of each channel of the row over the window
    reg [ROW*ACTIVATION-1:0] largest;
    reg [ROW*ACTIVATION-1:0] larger;
    wire [ROW*ACTIVATION-1:0] x_now;
    generate
        if (MAXIMUM) begin : delayed
            reg [(LEVELS+1)*ROW*ACTIVATION-1:0] x_later;
            always @(posedge clk)
                if (LEVELS == 0) x_later <= own_x_3;
                else x_later <= {x_later[LEVELS*ROW*ACTIVATION-1:0], own_x_3};
            assign x_now = x_later[LEVELS*ROW*ACTIVATION +: ROW*ACTIVATION];
        end else begin : absent
            assign x_now = {(ROW*ACTIVATION){1'b0}};
        end
    endgenerate
    integer i;
    always @* begin
        for (i = 0; i < ROW; i = i + 1)
            larger[i*ACTIVATION +: ACTIVATION] =
                (now_first || $signed(x_now[i*ACTIVATION +: ACTIVATION]) > $signed(largest[i*ACTIVATION +: ACTIVATION]))
                ? x_now[i*ACTIVATION +: ACTIVATION] : largest[i*ACTIVATION +: ACTIVATION];
    end
    always @(posedge clk) if (now_valid) largest <= larger;

    // --- products, their sum, the accumulator, the results on their way out
    wire [P*ACCUMULATOR-1:0] finished;
    generate
        for (p = 0; p < P; p = p + 1) begin : outputs
            // a tree: node 1 is the root, the products are nodes Q .. 2Q-1
            for (q = 1; q < 2*Q; q = q + 1) begin : node
                reg signed [SUM-1:0] value;
            end
            for (q = 0; q < Q; q = q + 1) begin : products
                wire signed [ACTIVATION-1:0] x;
                if (BY_CHANNEL && p < ROW && p % Q == q) begin : either
                    assign x = own_x_3[p*ACTIVATION +: ACTIVATION];
                end else begin : shared
                    assign x = x_3[q*ACTIVATION +: ACTIVATION];
                end
                wire signed [WEIGHT-1:0] w = w_3[(p*Q + q)*WEIGHT +: WEIGHT];
                wire signed [PRODUCT-1:0] product = x * w;
                always @(posedge clk) node[Q + q].value <= product;
            end
            for (q = 1; q < Q; q = q + 1) begin : additions
                always @(posedge clk) node[q].value <= node[2*q].value + node[2*q + 1].value;
            end

            reg signed [ACCUMULATOR-1:0] sum;
            wire signed [ACCUMULATOR-1:0] wide = node[1].value;
            wire signed [ACCUMULATOR-1:0] next = now_first ? wide : sum + wide;
            always @(posedge clk) if (now_valid) sum <= next;
            if (MAXIMUM && p < ROW) begin : either
                wire signed [ACTIVATION-1:0] top = larger[p*ACTIVATION +: ACTIVATION];
                wire signed [ACCUMULATOR-1:0] top_wide = top;
                assign finished[p*ACCUMULATOR +: ACCUMULATOR] = maximum ? top_wide : next;
            end else begin : sums
                assign finished[p*ACCUMULATOR +: ACCUMULATOR] = next;
            end
        end
    endgenerate

    reg [P*ACCUMULATOR-1:0] leaving;
    reg [DRAIN-1:0] words_left;
    reg pixel_ends;
    reg step_ends;
    always @(posedge clk) begin
        if (now_last) leaving <= finished;
        else leaving <= leaving >> (Q*ACCUMULATOR);
        if (reset) out_valid <= 1'b0;
        else out_valid <= now_last || (out_valid && words_left != 0);
        if (now_last) begin
            words_left <= (last_group_at[DELAY-1] ? words_last : words_full) - 1'b1;
            pixel_ends <= last_group_at[DELAY-1];
            step_ends <= last_of_step_at[DELAY-1];
        end else begin
            words_left <= words_left - 1'b1;
        end
    end
    assign out_sums = leaving[Q*ACCUMULATOR-1:0];
    assign out_pixel_ends = pixel_ends && words_left == 0;
    assign out_step_ends = step_ends && words_left == 0;
endmodule
