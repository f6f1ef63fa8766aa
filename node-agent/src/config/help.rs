//! The text of `weftd --help`.

use std::fmt::Write as _;

use super::options::{Group, OPTIONS, Opt, Shape};

const WIDTH: usize = 100;
const INDENT: usize = 8;

pub(super) fn text() -> String {
    let mut text = String::from(
        "weftd: the node agent of weft, a pod network for Linux hosts\n\n\
         Usage: weftd [OPTION]...\n\n\
         Without any option it is flanneld: it leases a subnet in etcd at its default endpoints. Options are written \
         -x, --x,\n--x=VALUE or --x VALUE. Each can also be set by the variable shown beside it; the command line \
         wins.\n",
    );
    for group in Group::ALL {
        let _ = write!(text, "\n{}:\n", group.title());
        for opt in OPTIONS.iter().filter(|o| o.group == group) {
            describe(&mut text, opt);
        }
    }
    text.push_str("\n  -h, --help\n        print this help and exit\n");
    text
}

fn describe(text: &mut String, opt: &Opt) {
    let dashes = if opt.name.len() == 1 { "-" } else { "--" };
    let value = match opt.shape {
        Shape::Value(name) => format!(" {name}"),
        Shape::List(name) => format!(" {name} ..."),
        Shape::Switch => "[=true|false]".to_owned(),
    };
    let _ = writeln!(text, "  {dashes}{}{value}  [{}]", opt.name, opt.variable());
    let default = match opt.default {
        "" | "false" => String::new(),
        default => format!(" (default: {default})"),
    };
    wrap(text, &format!("{}{default}", opt.help));
}

fn wrap(text: &mut String, sentence: &str) {
    let mut line = " ".repeat(INDENT - 1);
    for word in sentence.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            let _ = writeln!(text, "{line}");
            line = " ".repeat(INDENT - 1);
        }
        line.push(' ');
        line.push_str(word);
    }
    let _ = writeln!(text, "{line}");
}
