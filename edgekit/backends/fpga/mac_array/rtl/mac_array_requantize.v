// Q sums a cycle to Q feature-map values: bias, multiplier (average pools), shift that rounds half up, clamp, address.
// (sum << 1+LEFT) >> shift is the result with one more bit; adding one and dropping that bit rounds half up.
module mac_array_requantize #(
    parameter Q = 4,
    parameter ACTIVATION = 8,
    parameter ACCUMULATOR = 32,
    parameter BIAS = 32,
    parameter SHIFT = 6,
    parameter LEFT = 0,            // largest shift to the left of the network
    parameter MULTIPLIER = 0,      // bits of the multiplier; 0: the network has none
    parameter MULTIPLICAND = 18,   // bits of the sums that are multiplied
    parameter FEATURE_ADDRESS = 10,
    parameter BIAS_ADDRESS = 8,
    parameter WIDE = 33            // bits of the shifted sum
) (
    input wire clk,
    input wire reset,
    input wire start,
    input wire [FEATURE_ADDRESS-1:0] output_base,
    input wire [FEATURE_ADDRESS-1:0] output_pixel,  // increment of the address after the last word of a pixel
    input wire [BIAS_ADDRESS-1:0] bias_base,
    input wire bias_repeat,  // one bias and shift for all words
    input wire scaled,
    input wire [(MULTIPLIER > 0 ? MULTIPLIER : 1)-1:0] multiplier,
    input wire [ACTIVATION-1:0] low,
    input wire [ACTIVATION-1:0] high,
    input wire in_valid,
    input wire [Q*ACCUMULATOR-1:0] in_sums,
    input wire in_pixel_ends,
    input wire in_step_ends,
    output reg [BIAS_ADDRESS-1:0] bias_address,
    input wire [Q*(BIAS+SHIFT)-1:0] biases,  // one cycle after the address
    output reg write,
    output reg [FEATURE_ADDRESS-1:0] write_address,
    output wire [Q*ACTIVATION-1:0] write_data,
    output reg done
);
    localparam STAGES = 8;
    reg [STAGES-1:0] valid_at;
    reg [STAGES-1:0] pixel_ends_at;
    reg [STAGES-1:0] step_ends_at;
    reg [FEATURE_ADDRESS-1:0] next_address;
    always @(posedge clk) begin
        valid_at <= reset ? {STAGES{1'b0}} : {valid_at[STAGES-2:0], in_valid};
        pixel_ends_at <= {pixel_ends_at[STAGES-2:0], in_pixel_ends};
        step_ends_at <= {step_ends_at[STAGES-2:0], in_step_ends};

        if (start) bias_address <= bias_base;
        else if (in_valid && !bias_repeat) bias_address <= in_pixel_ends ? bias_base : bias_address + 1'b1;

        write <= !reset && valid_at[STAGES-1];
        write_address <= next_address;
        done <= !reset && valid_at[STAGES-1] && step_ends_at[STAGES-1];
        if (start) next_address <= output_base;
        else if (valid_at[STAGES-1])
            next_address <= next_address + (pixel_ends_at[STAGES-1] ? output_pixel : {{(FEATURE_ADDRESS-1){1'b0}}, 1'b1});
    end

    genvar q;
    generate
        for (q = 0; q < Q; q = q + 1) begin : channel
            // 1: the sum waits for its bias  2: bias in a register  3: with bias  4: times the multiplier
            // 5, 6: shifted  7: rounded  8: compared  then clamped
            reg signed [ACCUMULATOR-1:0] sum_1;
            reg signed [ACCUMULATOR-1:0] sum_2;
            reg signed [BIAS-1:0] bias_2;
            reg [SHIFT-1:0] shift_2;
            reg signed [ACCUMULATOR-1:0] sum_3;
            reg [SHIFT-1:0] shift_3;
            reg signed [WIDE-1:0] sum_4;
            reg [SHIFT-1:0] shift_4;
            reg signed [WIDE-1:0] sum_5;
            reg [SHIFT-1:0] shift_5;
            reg signed [WIDE-1:0] sum_6;
            reg signed [WIDE-1:0] sum_7;
            reg signed [ACTIVATION-1:0] value_8;
            reg above_8;
            reg below_8;
            reg [ACTIVATION-1:0] value;
            wire signed [WIDE-1:0] sum_3_wide = sum_3;
            wire signed [ACTIVATION-1:0] lowest = low;
            wire signed [ACTIVATION-1:0] highest = high;
            wire signed [WIDE-1:0] sum_3_scaled;
            if (MULTIPLIER > 0) begin : multiply
                wire signed [MULTIPLICAND-1:0] a = sum_3[MULTIPLICAND-1:0];
                wire signed [MULTIPLIER:0] b = {1'b0, multiplier};
                wire signed [MULTIPLICAND+MULTIPLIER:0] product = a * b;
                wire signed [WIDE-1:0] product_wide = product;
                assign sum_3_scaled = scaled ? product_wide : sum_3_wide;
            end else begin : plain
                assign sum_3_scaled = sum_3_wide;
            end

            always @(posedge clk) begin
                sum_1 <= in_sums[q*ACCUMULATOR +: ACCUMULATOR];
                sum_2 <= sum_1;
                bias_2 <= biases[q*(BIAS+SHIFT) +: BIAS];
                shift_2 <= biases[q*(BIAS+SHIFT) + BIAS +: SHIFT];
                sum_3 <= sum_2 + bias_2;
                shift_3 <= shift_2;
                sum_4 <= sum_3_scaled <<< (LEFT + 1);
                shift_4 <= shift_3;
                sum_5 <= sum_4 >>> {shift_4[SHIFT-1:2], 2'b00};
                shift_5 <= shift_4;
                sum_6 <= sum_5 >>> shift_5[1:0];
                sum_7 <= (sum_6 + 2'sd1) >>> 1;
                value_8 <= sum_7[ACTIVATION-1:0];
                above_8 <= sum_7 > highest;
                below_8 <= sum_7 < lowest;
                value <= above_8 ? high : below_8 ? low : value_8;
            end
            assign write_data[q*ACTIVATION +: ACTIVATION] = value;
        end
    endgenerate
endmodule
