#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_agent::udp::fuzz;

fuzz_target!(|input: &[u8]| fuzz::datagrams(input));
