//! One line, one JSON object.

use std::io::{self, BufRead, Read};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Longest line that is read, either way.
pub const LINE_MOST: usize = 64 << 10;
/// How alike a misspelt command must be to the one that is suggested.
const ALIKE: f64 = 0.8;

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The command.
    pub execute: String,
    /// Its arguments.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub arguments: Map<String, Value>,
    /// Anything; comes back with the reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Value>,
}

/// A command that was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct Refused {
    /// QEMU's class: `GenericError` or `CommandNotFound`.
    pub class: String,
    /// Why, for a person.
    pub desc: String,
}

impl Refused {
    /// Refused for this reason.
    #[must_use]
    pub fn because(desc: impl Into<String>) -> Self {
        Self {
            class: "GenericError".into(),
            desc: desc.into(),
        }
    }

    /// There is no such command: the one that was probably meant, or all there are.
    #[must_use]
    pub fn unknown(name: &str, known: &[&str]) -> Self {
        let nearest = known
            .iter()
            .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .filter(|(score, _)| *score >= ALIKE);
        let hint = match nearest {
            Some((_, candidate)) => format!("did you mean {candidate}?"),
            None => format!("known here: {}", known.join(", ")),
        };
        Self {
            class: "CommandNotFound".into(),
            desc: format!("the command {name} is not known, {hint}"),
        }
    }
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// Done, with what it yields.
    Return(Value),
    /// Not done, and why.
    Error(Refused),
}

/// A line that is no request or reply.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The connection is broken.
    #[error("control connection: {0}")]
    Io(#[from] io::Error),
    /// The line does not end.
    #[error("a line is longer than {LINE_MOST} bytes")]
    TooLong,
    /// The line is not the JSON that was expected.
    #[error(
        "not understood: {0}; expected one JSON object a line, such as {{\"execute\": \"status\"}}"
    )]
    Syntax(serde_json::Error),
}

/// The next line that is not blank, without its end; `None` when the stream has ended.
pub(super) fn read_line(from: &mut impl BufRead, line: &mut Vec<u8>) -> Result<bool, WireError> {
    loop {
        line.clear();
        let n = from
            .by_ref()
            .take(LINE_MOST as u64)
            .read_until(b'\n', line)?;
        if n == 0 {
            return Ok(false);
        }
        if line.last() != Some(&b'\n') && n == LINE_MOST {
            return Err(WireError::TooLong);
        }
        if !line.trim_ascii().is_empty() {
            return Ok(true);
        }
    }
}

/// A reply as it goes out, the request's id with it.
pub(super) fn reply_line(reply: &Reply, id: Option<Value>) -> Vec<u8> {
    let mut value = serde_json::to_value(reply).unwrap_or_default();
    if let (Some(id), Some(object)) = (id, value.as_object_mut()) {
        object.insert("id".into(), id);
    }
    line(&value)
}

/// A value as a line.
pub(super) fn line(value: &Value) -> Vec<u8> {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_reply_carries_the_id_of_its_request() {
        let request: Request =
            serde_json::from_str(r#"{"execute": "status", "id": [1, "x"]}"#).unwrap();
        let line = reply_line(&Reply::Return(json!({})), request.id);
        assert_eq!(line, b"{\"id\":[1,\"x\"],\"return\":{}}\n");
    }

    #[test]
    fn lines_are_bounded_and_blank_ones_skipped() {
        let mut line = Vec::new();
        assert!(read_line(&mut &b"\n  \n{}\n"[..], &mut line).unwrap());
        assert_eq!(line, b"{}\n");
        let endless = vec![b'x'; LINE_MOST + 1];
        assert!(matches!(
            read_line(&mut &endless[..], &mut line),
            Err(WireError::TooLong)
        ));
        assert!(!read_line(&mut &b""[..], &mut line).unwrap());
    }

    #[test]
    fn an_unknown_command_is_refused_with_the_nearest() {
        let refused = Refused::unknown("chekpoint", &["status", "checkpoint"]);
        assert_eq!(
            refused.desc,
            "the command chekpoint is not known, did you mean checkpoint?"
        );
    }

    #[test]
    fn a_command_like_no_other_gets_the_whole_list() {
        for name in ["nonsense", "detach"] {
            let refused = Refused::unknown(name, &["status", "save", "events"]);
            assert_eq!(
                refused.desc,
                format!("the command {name} is not known, known here: status, save, events")
            );
        }
    }
}
