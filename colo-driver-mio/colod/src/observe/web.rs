//! The HTTP endpoint: metrics for Prometheus, health for orchestrators, a page for people.
//!
//! Read-only. Everything about a connection is bounded: how many there are, how long a request may
//! take to arrive, how large its head may be, how long a reader may read nothing.

use std::{
    convert::Infallible,
    net::{SocketAddr, TcpListener as StdListener},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::State,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{
        Html, IntoResponse, Json, Response,
        sse::{self, KeepAlive, Sse},
    },
    routing::get,
};
use colo_driver_mio::metrics::Snapshot;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use serde_json::{Value, json};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Mutex, OwnedSemaphorePermit, Semaphore, oneshot},
};
use tokio_stream::{StreamExt as _, wrappers::BroadcastStream};

use super::Observer;
use crate::cli::Failure;

/// Connections at a time; further ones are closed at once.
const CONNECTIONS_MOST: usize = 128;
/// Readers of the event stream at a time.
const STREAMS_MOST: usize = 32;
/// From the first byte of a connection to the end of a request's head.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// Bytes that a connection may buffer, a request's head among them.
const BUFFER_MOST: usize = 16 * 1024;
/// A reader that takes nothing for so long is gone.
const READER_TIME: Duration = Duration::from_secs(10);
/// How old an answer of the loop may be: a hundred scrapes a second ask the loop ten times.
const FRESH: Duration = Duration::from_millis(100);

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PAGE: &str = include_str!("page.html");

/// What the loop says of itself, asked from any thread; may block for a second.
pub(crate) trait Source: Send + Sync + 'static {
    /// The loop's status and counters, or why there are none.
    fn snapshot(&self) -> Result<Snapshot, String>;
    /// The status as the control socket prints it.
    fn status(&self) -> Result<Value, String>;
}

/// The endpoint's thread. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
    /// Where it listens; differs from what was asked for when the port was 0.
    pub(crate) local: SocketAddr,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _gone = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Listens and serves on a thread of its own.
///
/// # Errors
/// When the address cannot be listened on.
pub(crate) fn serve(
    listen: SocketAddr,
    vm: String,
    observer: Observer,
    source: impl Source,
) -> Result<Server, Failure> {
    let listener =
        StdListener::bind(listen).map_err(|error| format!("metrics.listen {listen}: {error}"))?;
    listener.set_nonblocking(true)?;
    let local = listener.local_addr()?;
    let (stop, stopped) = oneshot::channel();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()?;
    let shared = Arc::new(Shared {
        vm,
        observer,
        source: Arc::new(source),
        answer: Mutex::new(None),
        streams: Arc::new(Semaphore::new(STREAMS_MOST)),
    });
    let thread = thread::Builder::new().name("web".into()).spawn(move || {
        runtime.block_on(async move {
            tokio::select! {
                () = accept(listener, shared) => {}
                _ = stopped => {}
            }
        });
        // Whatever a connection still does is dropped with the runtime.
        runtime.shutdown_background();
    })?;
    Ok(Server {
        stop: Some(stop),
        thread: Some(thread),
        local,
    })
}

struct Shared {
    vm: String,
    observer: Observer,
    source: Arc<dyn Source>,
    answer: Mutex<Option<(Instant, Answer)>>,
    streams: Arc<Semaphore>,
}

/// What the loop said, shared by all who ask within [`FRESH`].
#[derive(Clone)]
struct Answer {
    snapshot: Result<Arc<Snapshot>, String>,
    status: Result<Value, String>,
}

impl Shared {
    /// Asks the loop, or takes what it said a moment ago. One asks, the others wait for it.
    async fn ask(&self) -> Answer {
        let mut answer = self.answer.lock().await;
        if let Some((at, answer)) = &*answer
            && at.elapsed() < FRESH
        {
            return answer.clone();
        }
        let source = Arc::clone(&self.source);
        let asked = tokio::task::spawn_blocking(move || Answer {
            snapshot: source.snapshot().map(Arc::new),
            status: source.status(),
        });
        let new = asked.await.unwrap_or_else(|error| Answer {
            snapshot: Err(error.to_string()),
            status: Err(error.to_string()),
        });
        *answer = Some((Instant::now(), new.clone()));
        new
    }
}

async fn accept(listener: StdListener, shared: Arc<Shared>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!("metrics.listen: {error}; there are no metrics until a restart");
            return;
        }
    };
    let room = Arc::new(Semaphore::new(CONNECTIONS_MOST));
    let router = router(shared);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Without room the connection is dropped, which closes it.
                if let Ok(permit) = Arc::clone(&room).try_acquire_owned() {
                    tokio::spawn(connection(stream, router.clone(), permit));
                }
            }
            // Out of descriptors, or the caller is gone already.
            Err(_) => tokio::time::sleep(FRESH).await,
        }
    }
}

async fn connection(stream: TcpStream, router: Router, _room: OwnedSemaphorePermit) {
    let socket = SockRef::from(&stream);
    let options = socket
        .set_tcp_user_timeout(Some(READER_TIME))
        .and_then(|()| socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(READER_TIME)))
        .and_then(|()| socket.set_tcp_nodelay(true));
    if options.is_err() {
        return;
    }
    let _ended = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .keep_alive(false)
        .max_buf_size(BUFFER_MOST)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await;
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .route("/api/status", get(status))
        .route("/api/timeline", get(timeline))
        .route("/events", get(events))
        .fallback(nothing)
        .with_state(shared)
}

async fn page() -> Response {
    const POLICY: HeaderValue = HeaderValue::from_static(
        "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
    );
    const NAME: HeaderName = header::CONTENT_SECURITY_POLICY;
    ([(NAME, POLICY)], Html(PAGE)).into_response()
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let answer = shared.ask().await;
    let snapshot = answer.snapshot.as_deref().ok();
    let text = shared.observer.text(&shared.vm, snapshot);
    ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response()
}

/// Whether the daemon lives.
async fn health(State(shared): State<Arc<Shared>>) -> Response {
    match shared.ask().await.snapshot {
        Ok(_) => (StatusCode::OK, "ok\n").into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

/// Whether a failure of either host would be survived.
async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    let (code, line) = match shared.ask().await.status {
        Ok(status) if status["protected"] == json!(true) => {
            (StatusCode::OK, "protected\n".to_owned())
        }
        Ok(status) => {
            let why = status["unprotected-reason"]
                .as_str()
                .unwrap_or("no reason is known");
            (
                StatusCode::SERVICE_UNAVAILABLE,
                format!("not protected: {why}\n"),
            )
        }
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    };
    (code, line).into_response()
}

async fn status(State(shared): State<Arc<Shared>>) -> Response {
    match shared.ask().await.status {
        Ok(status) => Json(status).into_response(),
        Err(why) => (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(json!({ "error": why })),
        )
            .into_response(),
    }
}

async fn timeline(State(shared): State<Arc<Shared>>) -> Response {
    Json(shared.observer.timeline()).into_response()
}

/// Every event from now on, as it happens.
async fn events(State(shared): State<Arc<Shared>>) -> Response {
    let Ok(room) = Arc::clone(&shared.streams).try_acquire_owned() else {
        let busy = "too many readers of the event stream\n";
        return (StatusCode::SERVICE_UNAVAILABLE, busy).into_response();
    };
    let stream = BroadcastStream::new(shared.observer.subscribe()).map(move |event| {
        let _held_as_long_as_the_stream = &room;
        let text = event.map_or_else(
            |lost| {
                json!({ "event": "EVENTS_LOST", "data": { "why": lost.to_string() } }).to_string()
            },
            |text| text.to_string(),
        );
        Ok::<_, Infallible>(sse::Event::default().data(text))
    });
    Sse::new(stream)
        .keep_alive(KeepAlive::default())
        .into_response()
}

async fn nothing() -> Response {
    let known = "there is /, /metrics, /healthz, /readyz, /api/status, /api/timeline and /events\n";
    (StatusCode::NOT_FOUND, known).into_response()
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpStream,
    };

    use colo_driver_mio::{
        handle::What,
        metrics::{LoopStats, Snapshot},
    };
    use colo_proto::{
        event::{Cause, Event},
        id::{Channel, Epoch},
        stats::{CheckpointTimes, Stats},
        status::Status,
        time::Instant as At,
    };

    use super::*;

    /// A loop that says what the test wants, or nothing.
    struct Says(Result<bool, String>);

    impl Source for Says {
        fn snapshot(&self) -> Result<Snapshot, String> {
            let protected = self.0.clone()?;
            let mut driver = LoopStats::default();
            driver.bytes.insert(Channel::Control, (7, 9));
            Ok(Snapshot {
                at: At::from_nanos(0),
                status: Status {
                    protected,
                    ..Status::default()
                },
                stats: Stats {
                    released: 41,
                    ..Stats::default()
                },
                driver,
                channels: Vec::new(),
            })
        }

        fn status(&self) -> Result<Value, String> {
            let protected = self.0.clone()?;
            Ok(json!({ "vm": "web", "protected": protected, "unprotected-reason": "no peer" }))
        }
    }

    fn server(says: Result<bool, &str>) -> (Server, Observer) {
        let observer = Observer::new();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let source = Says(says.map_err(str::to_owned));
        let server = serve(any, "web".into(), observer.clone(), source).unwrap();
        (server, observer)
    }

    /// Sends bytes and reads until the other end closes.
    fn ask(server: &Server, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(server.local).unwrap();
        // A server that refuses the request early closes while it is being written.
        let _closed = stream.write_all(request);
        let mut answer = Vec::new();
        let _reset = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn get(server: &Server, path: &str) -> String {
        ask(
            server,
            format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes(),
        )
    }

    fn checkpoint() -> What {
        What::Machine(Event::Checkpointed {
            epoch: Epoch(5),
            why: Cause::Longest,
            pages: 12,
            times: CheckpointTimes {
                pause: Duration::from_micros(300),
                ..CheckpointTimes::default()
            },
        })
    }

    #[test]
    fn metrics_say_what_the_loop_says_and_count_what_was_reported() {
        let (server, observer) = server(Ok(true));
        observer.heard(&checkpoint(), &json!({ "event": "CHECKPOINTED" }));
        let text = get(&server, "/metrics");
        for line in [
            "colo_up 1",
            "colo_protected 1",
            "colo_frames_released_total 41",
            "colo_checkpoints_total{cause=\"longest\"} 1",
            "colo_checkpoint_pages_total 12",
            "colo_pause_seconds_count 1",
            "colo_channel_bytes_total{channel=\"Control\",direction=\"sent\"} 9",
            "colo_info{vm=\"web\",role=",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        assert!(get(&server, "/api/timeline").contains("CHECKPOINTED"));
    }

    #[test]
    fn health_and_readiness_are_status_codes_with_a_reason() {
        let (protected, _observer) = server(Ok(true));
        assert!(get(&protected, "/healthz").starts_with("HTTP/1.1 200"));
        assert!(get(&protected, "/readyz").starts_with("HTTP/1.1 200"));
        let (alone, _observer) = server(Ok(false));
        assert!(get(&alone, "/healthz").starts_with("HTTP/1.1 200"));
        let ready = get(&alone, "/readyz");
        assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
        assert!(ready.ends_with("not protected: no peer\n"), "{ready}");
        let (mute, _observer) = server(Err("no answer within 1s"));
        assert!(get(&mute, "/healthz").starts_with("HTTP/1.1 503"));
        assert!(get(&mute, "/metrics").contains("colo_up 0"));
    }

    #[test]
    fn malformed_and_huge_requests_end_their_own_connection_only() {
        let (server, _observer) = server(Ok(true));
        for request in [
            b"\0\xff\r\n\r\n".to_vec(),
            b"GET /metrics\r\n\r\n".to_vec(),
            [b"GET / HTTP/1.1\r\nX: ".as_slice(), &[b'a'; 100_000]].concat(),
        ] {
            let answer = ask(&server, &request);
            assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        assert!(get(&server, "/nonsense").starts_with("HTTP/1.1 404"));
        assert!(
            ask(
                &server,
                b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
            )
            .starts_with("HTTP/1.1 405")
        );
        assert!(get(&server, "/healthz").starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn a_crowd_is_sent_away_and_the_place_is_free_afterwards() {
        let (server, _observer) = server(Ok(true));
        let idle: Vec<TcpStream> = (0..CONNECTIONS_MOST + 50)
            .map(|_| TcpStream::connect(server.local).unwrap())
            .collect();
        // Those without a place are closed; which end up so is the kernel's order.
        let mut last = idle.last().unwrap();
        assert_eq!(last.read(&mut [0]).unwrap_or(0), 0);
        drop(idle);
        let answered = (0..100).any(|_| {
            let answer = get(&server, "/healthz");
            answer.starts_with("HTTP/1.1 200")
        });
        assert!(answered);
    }

    #[test]
    fn the_stream_tells_what_happens_and_ends_with_the_server() {
        let (server, observer) = server(Ok(true));
        let mut stream = TcpStream::connect(server.local).unwrap();
        stream
            .write_all(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        let mut seen = String::new();
        let mut buffer = [0; 4096];
        while !seen.contains("text/event-stream") {
            let got = stream.read(&mut buffer).unwrap();
            seen.push_str(std::str::from_utf8(&buffer[..got]).unwrap());
        }
        observer.heard(&What::Up(Channel::Net), &json!({ "event": "CHANNEL_UP" }));
        while !seen.contains("CHANNEL_UP") {
            let got = stream.read(&mut buffer).unwrap();
            assert_ne!(got, 0, "{seen}");
            seen.push_str(std::str::from_utf8(&buffer[..got]).unwrap());
        }
        drop(server);
        while stream.read(&mut buffer).is_ok_and(|got| got > 0) {}
    }
}
