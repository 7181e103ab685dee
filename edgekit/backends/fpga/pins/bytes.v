// Bytes at the pins: both streams of a design (the macro DESIGN names its module) are cut into bytes, the lowest first.
// A design's words have more bits than a package has pins.
module edgekit_bytes #(
    parameter WORD = 16,        // bits of a word of the design
    parameter IN_BYTES = 2,     // bytes of an input word
    parameter OUT_BYTES = 2     // bytes of an output word that hold results
) (
    input wire clk,
    input wire reset,
    input wire in_valid,
    output wire in_ready,
    input wire [7:0] in_data,
    input wire in_last,         // with the last byte of an inference
    output wire out_valid,
    input wire out_ready,
    output wire [7:0] out_data,
    output wire out_last
);
    localparam IN_COUNT = $clog2(IN_BYTES + 1);
    localparam OUT_COUNT = $clog2(OUT_BYTES + 1);

    // bytes are shifted in from the top, so that the first one ends up lowest
    reg [8*IN_BYTES-1:0] word;
    reg [IN_COUNT-1:0] held;
    reg word_last;
    wire word_valid = held == IN_BYTES;
    wire word_ready;
    assign in_ready = !word_valid || word_ready;
    always @(posedge clk) begin
        if (in_valid && in_ready) begin
            word <= {in_data, word} >> 8;
            word_last <= in_last;
            held <= word_valid ? 1 : held + 1'b1;
        end else if (word_ready && word_valid) held <= 0;
        if (reset) held <= 0;
    end

    wire result_valid, result_last;
    wire [WORD-1:0] result;
    reg [8*OUT_BYTES-1:0] rest;
    reg [OUT_COUNT-1:0] remaining;
    reg rest_last;
    wire result_ready = remaining == 0 || (remaining == 1 && out_ready);
    assign out_valid = remaining != 0;
    assign out_data = rest[7:0];
    assign out_last = rest_last && remaining == 1;
    always @(posedge clk) begin
        if (result_valid && result_ready) begin
            rest <= result;
            rest_last <= result_last;
            remaining <= OUT_BYTES;
        end else if (out_valid && out_ready) begin
            rest <= rest >> 8;
            remaining <= remaining - 1'b1;
        end
        if (reset) remaining <= 0;
    end

    `DESIGN core (
        .clk(clk), .reset(reset),
        .in_valid(word_valid), .in_ready(word_ready), .in_data(word[WORD-1:0]), .in_last(word_last),
        .out_valid(result_valid), .out_ready(result_ready), .out_data(result), .out_last(result_last)
    );
endmodule
