//! The head of an HTTP/1.1 request.

/// What a response depends on.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) query: &'a str,
    pub(crate) length: u64,
    pub(crate) keep_alive: bool,
    pub(crate) expects_continue: bool,
}

/// Why a head is not answered as asked: status and reason.
pub(crate) type Refusal = (u16, &'static str);

/// The length of a complete head at the start of `input`, its empty line included.
pub(crate) fn head_length(input: &[u8]) -> Option<usize> {
    input
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .map(|at| at + 4)
}

impl<'a> Request<'a> {
    pub(crate) fn parse(head: &'a [u8]) -> Result<Self, Refusal> {
        const BAD: Refusal = (400, "Bad Request");
        let text = core::str::from_utf8(head).map_err(|_| BAD)?;
        let mut lines = text.split("\r\n");
        let mut words = lines.next().ok_or(BAD)?.split(' ');
        let (Some(method), Some(target), Some(version)) =
            (words.next(), words.next(), words.next())
        else {
            return Err(BAD);
        };
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let keep_alive = match version {
            "HTTP/1.1" => true,
            "HTTP/1.0" => false,
            _ => return Err((505, "HTTP Version Not Supported")),
        };
        let mut request = Self {
            method,
            path,
            query,
            length: 0,
            keep_alive,
            expects_continue: false,
        };
        for line in lines.take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(':').ok_or(BAD)?;
            let value = value.trim();
            if name.eq_ignore_ascii_case("content-length") {
                request.length = value.parse().map_err(|_| BAD)?;
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                return Err((501, "Not Implemented"));
            } else if name.eq_ignore_ascii_case("connection") {
                request.keep_alive = !value.eq_ignore_ascii_case("close")
                    && (keep_alive || value.eq_ignore_ascii_case("keep-alive"));
            } else if name.eq_ignore_ascii_case("expect") {
                request.expects_continue = value.eq_ignore_ascii_case("100-continue");
            }
        }
        Ok(request)
    }

    /// A number of the query, `key=value`.
    pub(crate) fn number(&self, key: &str) -> Option<u64> {
        self.query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find_map(|(name, value)| {
                if name == key {
                    value.parse().ok()
                } else {
                    None
                }
            })
    }
}
