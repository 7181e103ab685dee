// One bank of feature maps: one write port, one read port, the read registered, so that it becomes block RAM.
// No layer reads a word in the cycle in which it is written (no_rw_check tells yosys so).
module mac_array_bank #(
    parameter WIDTH = 32,
    parameter DEPTH = 1024,
    parameter ADDRESS = 10
) (
    input wire clk,
    input wire write,
    input wire [ADDRESS-1:0] write_address,
    input wire [WIDTH-1:0] write_data,
    input wire [ADDRESS-1:0] read_address,
    output reg [WIDTH-1:0] read_data
);
    (* no_rw_check *) reg [WIDTH-1:0] words [0:DEPTH-1];

    always @(posedge clk) begin
        if (write) words[write_address] <= write_data;
        read_data <= words[read_address];
    end
endmodule

// Feature maps in 2^SELECT banks, neighbouring words in neighbouring banks: a read gives one word and all words of its row.
module mac_array_memory #(
    parameter WIDTH = 32,
    parameter SELECT = 2,   // low bits of the address that number the banks; 0: one bank
    parameter BANKS = 4,
    parameter DEPTH = 256,  // of a bank
    parameter ADDRESS = 10
) (
    input wire clk,
    input wire write,
    input wire [ADDRESS-1:0] write_address,
    input wire [WIDTH-1:0] write_data,
    input wire [ADDRESS-1:0] read_address,
    output wire [WIDTH-1:0] read_word,
    output wire [BANKS*WIDTH-1:0] read_row
);
    localparam ROW = ADDRESS - SELECT;
    localparam [ADDRESS-1:0] BANK_MASK = BANKS - 1;
    reg [ADDRESS-1:0] selected;
    always @(posedge clk) selected <= read_address & BANK_MASK;
    assign read_word = read_row[selected*WIDTH +: WIDTH];

    genvar bank;
    generate
        for (bank = 0; bank < BANKS; bank = bank + 1) begin : banks
            mac_array_bank #(.WIDTH(WIDTH), .DEPTH(DEPTH), .ADDRESS(ROW)) one (
                .clk(clk), .write(write && (write_address & BANK_MASK) == bank),
                .write_address(write_address[ADDRESS-1:SELECT]), .write_data(write_data),
                .read_address(read_address[ADDRESS-1:SELECT]), .read_data(read_row[bank*WIDTH +: WIDTH])
            );
        end
    endgenerate
endmodule
