//! A QEMU monitor: commands and events, one at a time, with a bound on every wait.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    time::Duration,
};

use serde_json::{Value, json};

/// Long enough for a busy machine; a QEMU that hangs fails the test.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Qmp {
    input: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Takes the connection that a starting QEMU makes.
    pub(crate) fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qmp = Self {
            input: BufReader::new(stream),
            events: vec![],
        };
        let greeting = qmp.line();
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    /// Runs a command that must succeed.
    pub(crate) fn run(&mut self, command: &str, arguments: Value) -> Value {
        // In one write: QEMU acts on the last brace and, told to quit, is gone before a newline.
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.input.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let mut answer = self.line();
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            self.events.push(answer);
        }
    }

    /// Waits for the oldest event of this name that was not waited for; one that came before
    /// counts.
    pub(crate) fn wait(&mut self, event: &str) -> Value {
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == event) {
                return self.events.remove(at);
            }
            let line = self.line();
            self.events.push(line);
        }
    }

    /// `count` little-endian words of guest-physical memory.
    pub(crate) fn words(&mut self, address: u64, count: usize) -> Vec<u64> {
        let command = json!({"command-line": format!("xp /{count}gx {address:#x}")});
        let text = self.run("human-monitor-command", command);
        let text = text.as_str().unwrap();
        text.lines()
            .filter_map(|line| line.split_once(": "))
            .flat_map(|(_, words)| words.split_whitespace())
            .map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap())
            .collect()
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        let n = self.input.read_line(&mut line).unwrap();
        assert!(n > 0, "QEMU closed its monitor");
        serde_json::from_str(&line).unwrap()
    }
}
