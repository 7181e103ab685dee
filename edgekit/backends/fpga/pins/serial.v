// A design on a board with three pins: clock, and a serial line of 8 data bits, no parity, 1 stop bit, DIVISOR cycles a bit.
// The host sends the bytes of one inference and reads the bytes of its result before it sends the next.
// A break on the line (low for 16 bytes' time) starts the design anew.
module edgekit_serial #(
    parameter WORD = 16,
    parameter IN_BYTES = 2,
    parameter OUT_BYTES = 2,
    parameter IN_WORDS = 1,     // input words of an inference
    parameter DIVISOR = 217
) (
    input wire clk,
    input wire receive,
    output wire transmit
);
    localparam TOTAL = IN_BYTES * IN_WORDS;
    localparam COUNT = $clog2(TOTAL + 1);
    localparam BREAK = DIVISOR * 160;
    localparam QUIET = $clog2(BREAK + 1);

    reg [1:0] settled = 3;
    always @(posedge clk) settled <= {settled[0], receive};
    wire line = settled[1];

    // registers begin with the value that the bitstream gives them: in reset
    reg [QUIET-1:0] low = 0;
    reg reset = 1;
    always @(posedge clk) begin
        low <= line ? 0 : low == BREAK ? low : low + 1'b1;
        reset <= low == BREAK || (reset && !line);
    end

    wire byte_valid;
    wire [7:0] byte_data;
    serial_receiver #(.DIVISOR(DIVISOR)) receiver (
        .clk(clk), .reset(reset), .line(line), .valid(byte_valid), .data(byte_data)
    );

    reg pending;
    reg [7:0] pending_data;
    reg [COUNT-1:0] number;
    wire pending_ready;
    always @(posedge clk) begin
        if (byte_valid) begin
            pending <= 1;
            pending_data <= byte_data;
        end else if (pending_ready) pending <= 0;
        if (pending && pending_ready) number <= number == TOTAL - 1 ? 0 : number + 1'b1;
        if (reset) begin
            pending <= 0;
            number <= 0;
        end
    end

    wire result_valid, result_ready;
    wire [7:0] result_data;
    edgekit_bytes #(.WORD(WORD), .IN_BYTES(IN_BYTES), .OUT_BYTES(OUT_BYTES)) bytes (
        .clk(clk), .reset(reset),
        .in_valid(pending), .in_ready(pending_ready), .in_data(pending_data), .in_last(number == TOTAL - 1),
        .out_valid(result_valid), .out_ready(result_ready), .out_data(result_data), .out_last()
    );
    serial_transmitter #(.DIVISOR(DIVISOR)) transmitter (
        .clk(clk), .reset(reset), .line(transmit), .valid(result_valid), .ready(result_ready), .data(result_data)
    );
endmodule

// Bytes from a line that is already in step with the clock; each bit is taken in its middle.
module serial_receiver #(
    parameter DIVISOR = 217
) (
    input wire clk,
    input wire reset,
    input wire line,
    output reg valid,
    output reg [7:0] data
);
    localparam WAIT = $clog2(DIVISOR + DIVISOR / 2 + 1);
    reg busy;
    reg [WAIT-1:0] wait_cycles;
    reg [3:0] bits;
    always @(posedge clk) begin
        valid <= 0;
        if (!busy) begin
            busy <= !line;
            wait_cycles <= DIVISOR + DIVISOR / 2 - 1;
            bits <= 0;
        end else if (wait_cycles != 0) wait_cycles <= wait_cycles - 1'b1;
        else begin
            wait_cycles <= DIVISOR - 1;
            bits <= bits + 1'b1;
            if (bits == 8) begin
                busy <= 0;
                valid <= line;
            end else data <= {line, data[7:1]};
        end
        if (reset) begin
            busy <= 0;
            valid <= 0;
        end
    end
endmodule

module serial_transmitter #(
    parameter DIVISOR = 217
) (
    input wire clk,
    input wire reset,
    output reg line = 1,        // idle from the start
    input wire valid,
    output wire ready,
    input wire [7:0] data
);
    localparam WAIT = $clog2(DIVISOR + 1);
    reg [WAIT-1:0] wait_cycles;
    reg [3:0] bits;
    reg [8:0] rest;
    assign ready = bits == 0;
    always @(posedge clk) begin
        if (ready) begin
            line <= 1;
            if (valid) begin
                line <= 0;
                rest <= {1'b1, data};
                bits <= 10;
                wait_cycles <= DIVISOR - 1;
            end
        end else if (wait_cycles != 0) wait_cycles <= wait_cycles - 1'b1;
        else begin
            {rest, line} <= {1'b1, rest};
            bits <= bits - 1'b1;
            wait_cycles <= DIVISOR - 1;
        end
        if (reset) begin
            bits <= 0;
            line <= 1;
        end
    end
endmodule
