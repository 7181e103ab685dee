// A host at the other end of the serial line: sends the bytes of one inference, waits for its result, sends the next.
module serial_link #(
    parameter DIVISOR = 5,
    parameter RESULTS = OUT_BYTES_HERE
) (
    input wire clk,
    input wire reset,
    input wire in_valid,
    output wire in_ready,
    input wire [7:0] in_data,
    input wire in_last,
    output reg out_valid,
    input wire out_ready,
    output reg [7:0] out_data,
    output wire out_last
);
    wire to_board, from_board, sender_ready, byte_valid;
    wire [7:0] byte_data;
    reg waiting;
    reg [15:0] received;

    assign in_ready = sender_ready && !waiting;
    serial_transmitter #(.DIVISOR(DIVISOR)) sender (
        .clk(clk), .reset(reset), .line(to_board), .valid(in_valid && !waiting), .ready(sender_ready), .data(in_data)
    );
    edgekit_serial #(SETTINGS) board (.clk(clk), .receive(to_board), .transmit(from_board));
    serial_receiver #(.DIVISOR(DIVISOR)) listener (
        .clk(clk), .reset(reset), .line(from_board), .valid(byte_valid), .data(byte_data)
    );
    assign out_last = received == RESULTS - 1;
    always @(posedge clk) begin
        if (in_valid && in_ready && in_last) waiting <= 1;
        if (byte_valid) begin
            out_valid <= 1;
            out_data <= byte_data;
        end
        if (out_valid && out_ready) begin
            out_valid <= 0;
            received <= out_last ? 0 : received + 1'b1;
            if (out_last) waiting <= 0;
        end
        if (reset) begin
            waiting <= 0;
            out_valid <= 0;
            received <= 0;
        end
    end
endmodule
