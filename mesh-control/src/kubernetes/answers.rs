//! What is done to every answer of the API server before anybody reads it: no line of it is without an end, and who asks for patience in
//! a header alone is understood.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Frame, SizeHint};
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use hyper::{Response, StatusCode};
use kube::client::DynBody;

use crate::limits::MAX_ANSWER_BYTES;

type Error = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, thiserror::Error)]
#[error("an answer of the API server, or an event, has more than {MAX_ANSWER_BYTES} bytes")]
struct TooLarge;

/// Whether a request failed for the size of its answer.
#[must_use]
pub fn is_too_large(error: &kube::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<TooLarge>() {
            return true;
        }
        cause = error.source();
    }
    false
}

pub fn mend(answer: Response<Box<DynBody>>) -> Response<Box<DynBody>> {
    let (mut parts, body) = answer.into_parts();
    let Some(seconds) = patience(parts.status, &parts.headers) else {
        return Response::from_parts(parts, Box::new(Bounded { body, of_line: 0 }));
    };
    // The client reads of a refusal only what its body says, and this one's is no Status: the API server's queues and the gateways
    // before it answer in plain text.
    parts.headers.remove(CONTENT_LENGTH);
    let reason = if parts.status == StatusCode::TOO_MANY_REQUESTS {
        "TooManyRequests"
    } else {
        "ServiceUnavailable"
    };
    let status = serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": parts.status.as_u16(), "reason": reason,
        "message": format!("asks to be left alone for {seconds} s"),
        "details": {"retryAfterSeconds": seconds},
    });
    let body = Full::new(Bytes::from(status.to_string())).map_err(|never| match never {});
    Response::from_parts(parts, Box::new(body))
}

/// What only the header of an answer asks for.
fn patience(status: StatusCode, headers: &HeaderMap) -> Option<u32> {
    let is_json = |kind: &hyper::header::HeaderValue| kind.to_str().is_ok_and(|kind| kind.starts_with("application/json"));
    if !matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
        || headers.get(CONTENT_TYPE).is_some_and(is_json)
    {
        return None;
    }
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()
}

/// Fails once a line has more than [`MAX_ANSWER_BYTES`]: a watch's event is one, and any other answer is one as a whole. The client keeps
/// all of it until its end.
struct Bounded {
    body: Box<DynBody>,
    of_line: usize,
}

/// Bytes of the last line, should more arrive. The longest on the way counts as well.
fn line_after(of_line: usize, data: &[u8]) -> Option<usize> {
    let mut lines = data.split(|byte| *byte == b'\n');
    let mut current = of_line + lines.next().map_or(0, <[u8]>::len);
    let mut most = current;
    for line in lines {
        current = line.len();
        most = most.max(current);
    }
    (most <= MAX_ANSWER_BYTES).then_some(current)
}

impl hyper::body::Body for Bounded {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            match line_after(self.of_line, data) {
                Some(of_line) => self.of_line = of_line,
                None => return Poll::Ready(Some(Err(TooLarge.into()))),
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_without_an_end_is_refused_and_many_lines_are_not() {
        let most = vec![b'a'; MAX_ANSWER_BYTES];
        let half = &most[..MAX_ANSWER_BYTES / 2 + 1];
        assert_eq!(line_after(0, &most), Some(MAX_ANSWER_BYTES));
        assert_eq!(line_after(1, &most), None);
        assert_eq!(line_after(half.len(), half), None);
        assert_eq!(line_after(MAX_ANSWER_BYTES, b"\nabc"), Some(3));
        assert_eq!(line_after(MAX_ANSWER_BYTES, b"a\nabc"), None);
        let two = [half, b"\n", half].concat();
        assert_eq!(line_after(0, &two), Some(half.len()));
        assert_eq!(line_after(0, b""), Some(0));
    }

    #[test]
    fn patience_asked_for_in_a_header_alone_is_found() {
        let headers = |pairs: &[(hyper::header::HeaderName, &'static str)]| -> HeaderMap {
            let pairs = pairs.iter().cloned();
            pairs
                .map(|(name, value)| (name, hyper::header::HeaderValue::from_static(value)))
                .collect()
        };
        let plain = headers(&[(CONTENT_TYPE, "text/plain; charset=utf-8"), (RETRY_AFTER, "7")]);
        assert_eq!(patience(StatusCode::TOO_MANY_REQUESTS, &plain), Some(7));
        assert_eq!(patience(StatusCode::SERVICE_UNAVAILABLE, &plain), Some(7));
        assert_eq!(patience(StatusCode::OK, &plain), None);
        // A Status says it itself, with its reason.
        let json = headers(&[(CONTENT_TYPE, "application/json"), (RETRY_AFTER, "7")]);
        assert_eq!(patience(StatusCode::TOO_MANY_REQUESTS, &json), None);
        for odd in ["", "soon", "-1", "99999999999999999999", "Wed, 21 Oct 2015 07:28:00 GMT"] {
            assert_eq!(patience(StatusCode::TOO_MANY_REQUESTS, &headers(&[(RETRY_AFTER, odd)])), None);
        }
    }
}
