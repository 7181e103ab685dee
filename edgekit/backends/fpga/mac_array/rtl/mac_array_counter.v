// One loop: counts `last` + 1 steps, `at_last` is high during the last of them.
module mac_array_counter #(
    parameter WIDTH = 8
) (
    input wire clk,
    input wire load,
    input wire step,
    input wire [WIDTH-1:0] last,
    output reg at_last
);
    reg [WIDTH-1:0] left;
    wire again = load || (step && at_last);

    always @(posedge clk) begin
        if (again) begin
            left <= last;
            at_last <= (last == 0);
        end else if (step) begin
            left <= left - 1'b1;
            at_last <= (left == 1);
        end
    end
endmodule
