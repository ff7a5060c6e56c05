//! What the client asks of the guest's server, and what a good answer is. HTTP/1.1, keep-alive.

/// Longest head of an answer.
const HEAD_MOST: usize = 4096;
/// Longest body of an answer.
const BODY_MOST: usize = 1 << 20;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// `GET /counter`: how many requests the guest has answered, this one included.
    Counter,
    /// `GET /bytes/N`: so many bytes of the pattern.
    Bytes(usize),
    /// `POST /echo`: the same bytes back.
    Echo(Vec<u8>),
}

/// An answer that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HttpFault {
    /// The head is no head of HTTP/1.1 with a length.
    #[error("the answer begins with {0:?}, expected HTTP/1.1 200 and a Content-Length")]
    Head(String),
    /// A byte of the body is not the one that was due.
    #[error("byte {at} of the body is {got:#04x}, expected {expected:#04x}")]
    WrongByte {
        /// Index in the body.
        at: usize,
        /// What came.
        got: u8,
        /// What was due.
        expected: u8,
    },
    /// The body has another length.
    #[error("the body has {got} bytes, expected {expected}")]
    WrongLength {
        /// What came.
        got: usize,
        /// What was due.
        expected: usize,
    },
    /// The body does not say what the head's counter does.
    #[error("the counter in the body is {body:?}, in the head {head:?}")]
    TwoCounters {
        /// The body.
        body: String,
        /// The head's `X-Counter`.
        head: Option<u64>,
    },
}

/// Byte `at` of the pattern of `/bytes/N`.
pub(super) fn pattern(at: usize) -> u8 {
    colo_guests::server_byte(at as u64)
}

impl Asked {
    /// Something to ask; the counter most often.
    pub(super) fn any(counter_only: bool, random: &mut dyn FnMut() -> u64) -> Self {
        match random() % 8 {
            _ if counter_only => Self::Counter,
            0 => Self::Bytes(random() as usize % 20_000),
            1 => Self::Echo((0..random() % 4_000).map(|at| (at * 7) as u8).collect()),
            _ => Self::Counter,
        }
    }

    /// The request as it goes over the wire.
    pub(super) fn encode(&self, host: &str) -> Vec<u8> {
        match self {
            Self::Counter => format!("GET /counter HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes(),
            Self::Bytes(n) => {
                format!("GET /bytes/{n} HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
            }
            Self::Echo(body) => {
                let mut request = format!(
                    "POST /echo HTTP/1.1\r\nHost: {host}\r\nContent-Length: {}\r\n\r\n",
                    body.len()
                )
                .into_bytes();
                request.extend_from_slice(body);
                request
            }
        }
    }

    /// Judges an answer.
    pub(super) fn judge(&self, answer: &Answer) -> Result<(), HttpFault> {
        let body = answer.body().unwrap_or_default();
        match self {
            Self::Counter => {
                let text = String::from_utf8_lossy(body);
                if answer.counter.is_some() && text.trim().parse().ok() == answer.counter {
                    return Ok(());
                }
                Err(HttpFault::TwoCounters {
                    body: text.chars().take(40).collect(),
                    head: answer.counter,
                })
            }
            Self::Bytes(n) => compare(body, *n, pattern),
            Self::Echo(sent) => compare(body, sent.len(), |at| {
                sent.get(at).copied().unwrap_or_default()
            }),
        }
    }
}

fn compare(body: &[u8], expected: usize, due: impl Fn(usize) -> u8) -> Result<(), HttpFault> {
    for (at, &got) in body.iter().enumerate().take(expected) {
        let expected = due(at);
        if got != expected {
            return Err(HttpFault::WrongByte { at, got, expected });
        }
    }
    if body.len() != expected {
        return Err(HttpFault::WrongLength {
            got: body.len(),
            expected,
        });
    }
    Ok(())
}

/// Collects one answer from a stream, however it is cut.
#[derive(Debug, Default)]
pub(super) struct Answer {
    bytes: Vec<u8>,
    /// Where the body begins and how long it is, once the head is whole.
    body: Option<(usize, usize)>,
    /// What the head says of the counter.
    pub(super) counter: Option<u64>,
}

impl Answer {
    /// Takes what belongs to this answer from the front of `bytes`; says how much that was.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<usize, HttpFault> {
        let before = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        if self.body.is_none() {
            self.body = self.find_head()?;
        }
        let whole = self.body.map_or(usize::MAX, |(start, len)| start + len);
        self.bytes.truncate(whole);
        Ok(self.bytes.len() - before)
    }

    /// The body, once it is whole.
    pub(super) fn body(&self) -> Option<&[u8]> {
        let (start, len) = self.body?;
        self.bytes.get(start..start + len)
    }

    fn find_head(&mut self) -> Result<Option<(usize, usize)>, HttpFault> {
        let bad = || {
            let start = self.bytes.get(..80).unwrap_or(&self.bytes);
            HttpFault::Head(String::from_utf8_lossy(start).into_owned())
        };
        let Some(end) = self.bytes.windows(4).position(|w| w == b"\r\n\r\n") else {
            return if self.bytes.len() > HEAD_MOST {
                Err(bad())
            } else {
                Ok(None)
            };
        };
        let head = self
            .bytes
            .get(..end)
            .and_then(|head| str::from_utf8(head).ok())
            .filter(|head| head.starts_with("HTTP/1.1 200"))
            .ok_or_else(bad)?;
        let number = |wanted: &str| {
            head.lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(name, _)| name.eq_ignore_ascii_case(wanted))
                .and_then(|(_, value)| value.trim().parse::<u64>().ok())
        };
        let length = number("content-length")
            .and_then(|length| usize::try_from(length).ok())
            .filter(|&length| length <= BODY_MOST)
            .ok_or_else(bad)?;
        self.counter = number("x-counter");
        Ok(Some((end + 4, length)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_found_however_the_stream_is_cut() {
        let stream = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 ...";
        for step in 1..stream.len() {
            let (mut answer, mut at) = (Answer::default(), 0);
            while answer.body().is_none() {
                let end = stream.len().min(at + step);
                at += answer.push(&stream[at..end]).unwrap();
            }
            assert_eq!(answer.body(), Some(&b"hello"[..]));
            assert_eq!(at, stream.len() - 12, "the next answer is left alone");
        }
    }

    #[test]
    fn a_wrong_answer_is_named() {
        let error = Answer::default()
            .push(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")
            .unwrap_err();
        assert!(matches!(error, HttpFault::Head(_)));
        let mut body: Vec<u8> = (0..1000).map(pattern).collect();
        assert_eq!(judge(&Asked::Bytes(1000), 1, &body), Ok(()));
        body[700] ^= 1;
        assert!(matches!(
            judge(&Asked::Bytes(1000), 1, &body),
            Err(HttpFault::WrongByte { at: 700, .. })
        ));
        assert!(judge(&Asked::Bytes(999), 1, &body[..500]).is_err());
        assert_eq!(judge(&Asked::Counter, 17, b"17\n"), Ok(()));
        assert!(judge(&Asked::Counter, 17, b"18\n").is_err());
        assert!(judge(&Asked::Echo(vec![1, 2]), 1, &[1, 3]).is_err());
    }

    fn judge(asked: &Asked, counter: u64, body: &[u8]) -> Result<(), HttpFault> {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nX-Counter: {counter}\r\n\r\n",
            body.len()
        );
        let mut answer = Answer::default();
        answer.push(&[head.as_bytes(), body].concat()).unwrap();
        asked.judge(&answer)
    }
}
